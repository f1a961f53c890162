"""The pictures of a run: what each sublayer keeps, how the reward grew, and how allocations differ.

PNG at 150 dpi, in the Okabe-Ito colours that colour-blind readers tell apart. matplotlib is imported when a picture is
drawn, and draws without a screen. A caller's style changes no picture of ours, and stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ffgym.files import replacing
from ffgym.types import Allocation, Episode, Kind, Sublayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
AROUND = 2  # updates before and after one that its moving mean takes in
BLACK, BLUE, ORANGE, GREEN, YELLOW, SKY = "#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9"
# Colours by Okabe and Ito, each with its own marker, so that colour-blind readers and grey prints tell them apart.
SERIES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o"},
    {"color": ORANGE, "marker": "s"},
    {"color": GREEN, "marker": "^"},
    {"color": YELLOW, "marker": "D"},
    {"color": SKY, "marker": "v"},
    {"color": BLACK, "marker": "X"},
)
REFERENCE_LOOKS: tuple[dict[str, Any], ...] = tuple(
    {**SERIES[number], "linestyle": line} for number, line in ((1, "-"), (5, "--"), (2, "-."), (3, ":"))
)
UNIT_NAMES: dict[Kind, tuple[str, str]] = {
    "attention": ("Attention", "KV groups"),
    "mlp": ("MLP", "intermediate channels"),
    "experts": ("Mixture of experts", "experts"),
}
SHARES_KEPT: dict[Kind, str] = {
    "attention": "attention keeps {:.0%} of its units",
    "mlp": "the MLPs {:.0%}",
    "experts": "{:.0%} of the experts stay",
}


@contextmanager
def default_style() -> Iterator[None]:
    """Draw and save in matplotlib's default style, which is the caller's own again afterwards."""
    import matplotlib.style

    with matplotlib.style.context("default"):
        yield


@default_style()
def units_kept_figure(sublayers: Sequence[Sublayer], allocations: Mapping[str, Allocation], path: Path) -> Figure:
    """Write the picture of what a run found: see `draw_units_kept`."""
    found = next(iter(allocations.values()))
    return save_figure(draw_units_kept(sublayers, allocations, _kept_title(sublayers, found)), path)


@default_style()
def draw_units_kept(sublayers: Sequence[Sublayer], allocations: Mapping[str, Allocation], title: str) -> Figure:
    """Draw the share of its units that every sublayer keeps, over depth; attention and MLP in a panel each.

    Args:
        sublayers: 2L sublayers, in the order of ``Allocation.kept``.
        allocations: by label; the first is the found one and drawn as bars, the others as lines for reference.
    """
    kinds = _by_kind(sublayers)
    figure = new_figure(9.0, 2.6 * len(kinds), title)
    panels = figure.subplots(len(kinds), 1, sharex=True, sharey=True)
    for axes, (kind, indices) in zip(panels, kinds.items(), strict=True):
        layers = [sublayers[index].layer for index in indices]
        name, units = UNIT_NAMES[kind]
        counts = f"{min(sublayers[index].units for index in indices):,}"
        if (most := f"{max(sublayers[index].units for index in indices):,}") != counts:
            counts += f" to {most}"
        for number, (label, allocation) in enumerate(allocations.items()):
            shares = [100 * allocation.kept[index] / sublayers[index].units for index in indices]
            if number == 0:
                axes.bar(layers, shares, width=0.78, color=BLUE, alpha=0.55, label=label, zorder=2)
            else:
                line = dict(REFERENCE_LOOKS[(number - 1) % len(REFERENCE_LOOKS)])
                points = {"color": line["color"], "marker": line.pop("marker"), "linestyle": "", "markersize": 4.5}
                # Side by side within a bar, so that equal shares do not hide one another.
                offset = 0.9 * (number / len(allocations) - 0.5)
                places = [layer + offset for layer in layers]
                axes.plot(places, shares, **line, linewidth=0.8, alpha=0.55)
                axes.plot(places, shares, **points, label=label)
        axes.set_title(f"{name}: {counts} {units} in every layer", fontsize=10, loc="left")
        axes.set_ylabel(f"{units}\nkept (%)")
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 25))
        tidy(axes)
    panels[-1].set_xlabel("decoder layer (0 = next to the embedding)")
    panels[-1].set_xlim(-0.7, max(sublayer.layer for sublayer in sublayers) + 0.7)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    _legend(figure, {label: by_label[label] for label in allocations})
    return figure


def _kept_title(sublayers: Sequence[Sublayer], found: Allocation) -> str:
    """Say in numbers what the found allocation does."""
    shares = []
    for kind, indices in _by_kind(sublayers).items():
        kept, units = sum(found.kept[index] for index in indices), sum(sublayers[index].units for index in indices)
        shares.append(SHARES_KEPT[kind].format(kept / units))
    return f"Found at {found.sparsity:.1%} sparsity ({found.resource}): {', '.join(shares)}"


def _by_kind(sublayers: Sequence[Sublayer]) -> dict[Kind, list[int]]:
    """The kinds of sublayers that a model has, and the indices of those of each."""
    kinds = (kind for kind in UNIT_NAMES if any(sublayer.kind == kind for sublayer in sublayers))
    return {kind: [index for index, sublayer in enumerate(sublayers) if sublayer.kind == kind] for kind in kinds}


@default_style()
def reward_figure(episodes: Mapping[str, Sequence[Episode]], path: Path) -> Figure:
    """Draw rewards over the tokens evaluated so far: every episode faint, a mean over several updates strong.

    Hard text lowers all rewards of its update, so that the mean of a single one says little. Under a range of budgets,
    where every update has a target of its own, each has its own mean. Failed episodes stay out of the means. Dots far
    below those of the first search are left out: they would flatten it.

    Args:
        episodes: by the search's label, each in the order of evaluation; at least one search has an episode.
    """
    searches = {label: history for label, history in episodes.items() if history}
    scheduled = any(len({episode.target_sparsity for episode in history}) > 1 for history in searches.values())
    ranged = any(bool((np.diff([e.target_sparsity for e in history]) < 0).any()) for history in searches.values())
    title = f"Reward of every episode, and {'mean of every update' if ranged else 'moving mean'}"
    figure = new_figure(9.0, 5.0 if scheduled else 4.0, title)
    if scheduled:
        rewards, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        _draw_schedule(bottom, searches)
    else:
        rewards = bottom = figure.subplots()
    own = [episode.reward for episode in next(iter(searches.values())) if _has_reward(episode)]
    floor = min(own) - 0.5 * float(np.ptp(own)) if len(set(own)) > 1 else -math.inf
    for number, (label, history) in enumerate(searches.items()):
        look = SERIES[number % len(SERIES)]
        _draw_rewards(rewards, history, label, look, around=0 if ranged else AROUND, floor=floor)
    means = "large marks: mean of each update" if ranged else f"lines: moving mean of {2 * AROUND + 1} updates"
    failed = any(not _has_reward(episode) for history in searches.values() for episode in history)
    crosses = "; crosses on the edge: failed episodes" * failed
    rewards.set_title(f"dots: episodes; {means}{crosses}", fontsize=10, loc="left")
    rewards.set_ylabel("reward (higher is better)")
    rewards.set_ylim(bottom=max(rewards.get_ylim()[0], floor))
    for line in rewards.lines:
        if max(line.get_ydata(), default=math.inf) < floor:
            line.set_label(f"{line.get_label()} (below the scale)")
    handles, labels = rewards.get_legend_handles_labels()
    _legend(figure, dict(zip(labels, handles, strict=True)))
    tidy(rewards)
    bottom.set_xlabel("tokens evaluated so far (thousands)")
    bottom.set_xlim(left=0)
    return save_figure(figure, path)


def _has_reward(episode: Episode) -> bool:
    return math.isfinite(episode.reward) and not episode.failed


def _draw_rewards(
    axes: Axes, history: Sequence[Episode], label: str, look: Mapping[str, Any], *, around: int, floor: float
) -> None:
    """Draw one search: its episodes down to a floor, and means of each update and so many on either side."""
    tokens = _tokens_so_far(history)
    values = np.array([episode.reward for episode in history])
    drawn, colour = np.array([_has_reward(episode) for episode in history]), look["color"]
    updates = np.array([episode.update for episode in history])
    dots = drawn & (values >= floor)
    # Not clipped: half a dot on the lower edge could be taken for a cross.
    axes.scatter(tokens[dots], values[dots], s=14, color=colour, alpha=0.5, linewidths=0, zorder=2, clip_on=False)
    # The y of a failed episode is the reward's "worst", which may lie far below: the lower edge stands for it.
    edge: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "zorder": 3}
    failed = tokens[~drawn]
    axes.scatter(failed, np.full(len(failed), 0.02), marker="x", s=24, color=colour, linewidths=1.2, **edge)
    middles = np.unique(updates[drawn])
    xs = [tokens[drawn & (updates == update)].mean() for update in middles]
    means = [values[drawn & (abs(updates - update) <= around)].mean() for update in middles]
    axes.plot(xs, means, **look, linestyle="-" if around else "", label=label, zorder=4)


@default_style()
def allocations_figure(sublayers: Sequence[Sublayer], history: Sequence[Episode], title: str, path: Path) -> Figure:
    """Draw the share of its units that every sublayer kept over the course of a search: a mean over each update."""
    updates = np.array([episode.update for episode in history])
    shares = 100 * np.array([e.kept for e in history]) / np.array([sublayer.units for sublayer in sublayers])
    means = np.array([shares[updates == update].mean(axis=0) for update in np.unique(updates)])
    kinds = _by_kind(sublayers)
    figure = new_figure(9.0, 3.0 * len(kinds), title)
    panels = figure.subplots(len(kinds), 1, sharex=True)
    for axes, (kind, rows) in zip(panels, kinds.items(), strict=True):
        name, units = UNIT_NAMES[kind]
        # In cividis lightness rises evenly, so it reads the same in grey and to colour-blind readers.
        image = axes.imshow(means[:, rows].T, aspect="auto", cmap="cividis", origin="lower", interpolation="nearest")
        if np.ptp(means[:, rows]) == 0:  # a scale around a single value would go beyond 100 %
            image.set_clim(0, 100)
        axes.set_title(f"{name}: {units} kept (%)", fontsize=10, loc="left")
        axes.set_ylabel("decoder layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, pad=0.01)
    panels[-1].set_xlabel("update of the search")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return save_figure(figure, path)


def _draw_schedule(axes: Axes, searches: Mapping[str, Sequence[Episode]]) -> None:
    """Draw the sparsity that the schedule asked each search for."""
    for number, history in enumerate(searches.values()):
        targets = [100 * episode.target_sparsity for episode in history]
        colour = SERIES[number % len(SERIES)]["color"]
        look = {"color": colour, "linestyle": "-" if number == 0 else "--", "linewidth": 1.8}
        axes.plot([0, *_tokens_so_far(history)], [targets[0], *targets], drawstyle="steps-pre", **look)
    axes.set_ylabel("target\nsparsity (%)")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    tidy(axes)


def _tokens_so_far(history: Sequence[Episode]) -> np.ndarray:
    """Thousands of tokens evaluated when each episode was done, shape (episodes,)."""
    return np.cumsum([episode.tokens for episode in history]) / 1e3


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Make a figure (inches) with a title, that no window and no global state knows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def tidy(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Leave out the frame that says nothing, and put the grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Put the legend below the panels, in the order of the mapping."""
    columns = min(len(handles), 4)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def save_figure(figure: Figure, path: Path) -> Figure:
    """Write the PNG of a figure, and return the figure."""
    with replacing(path) as part:
        figure.savefig(part, format="png")
    return figure
