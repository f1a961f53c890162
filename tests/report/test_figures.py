import math
import subprocess
import sys
from dataclasses import replace

import made_up_episodes
import matplotlib
import pytest

from ffgym.errors import OutputError
from ffgym.report.comparison import differences_figure
from ffgym.report.figures import allocations_figure, reward_figure, units_kept_figure
from ffgym.report.paired import Difference
from ffgym.types import Allocation, Episode, Sublayer

pytestmark = pytest.mark.usefixtures("drawn")

SUBLAYERS = [
    sublayer
    for layer in range(4)
    for sublayer in (
        Sublayer(layer, "attention", 2, 32, 100, 100, 2, 16, 4),
        Sublayer(layer, "mlp", 64, 1, 3, 3, depth=4),
    )
]
FOUND = Allocation((2, 30, 1, 64, 2, 0, 0, 20), 500, 1568)
UNIFORM = Allocation((2, 40) * 4, 1200, 1568)


def episode(index: int, sparsity: float = 0.2, **changes) -> Episode:
    made_up = made_up_episodes.episode(index, index // 4, 0.5 + index / 100, sparsity=sparsity)
    return replace(made_up, kept=FOUND.kept, **changes)


def png_size(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_units_kept_is_a_png_at_150_dpi_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "kept.png"
    units_kept_figure(SUBLAYERS, {"found": FOUND, "uniform": UNIFORM}, path)
    assert png_size(path) == (1350, 780)


@pytest.mark.parametrize("count", [1, 7])
def test_units_kept_with_any_number_of_references(tmp_path, count):
    allocations = {f"a{i}": UNIFORM for i in range(count)}
    figure = units_kept_figure(SUBLAYERS, allocations, tmp_path / "kept.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(allocations)


def test_reward_figure_grows_a_panel_when_the_schedule_moves(tmp_path):
    still, moving = tmp_path / "still.png", tmp_path / "moving.png"
    reward_figure({"agent": [episode(i) for i in range(8)]}, still)
    reward_figure({"agent": [episode(i, 0.05 + i / 100) for i in range(8)], "random": []}, moving)
    assert png_size(moving)[1] > png_size(still)[1]


def test_a_line_of_means_over_five_updates_shows_progress_through_the_scatter(tmp_path):
    # the text of every other update is hard: rewards go up and down, and rise all the same
    history = [episode(i, reward=(i // 4) / 10 - 0.4 * (i // 4 % 2)) for i in range(40)]
    figure = reward_figure({"agent": history}, tmp_path / "a.png")
    axes, rewards = figure.axes[0], [e.reward for e in history]
    assert axes.collections[0].get_offsets()[:, 1].tolist() == rewards, "every episode as it is"
    (line,) = axes.lines
    assert line.get_linestyle() == "-"
    around = [rewards[max(0, 4 * k - 8) : 4 * k + 12] for k in range(10)]
    assert line.get_ydata() == pytest.approx([sum(each) / len(each) for each in around])
    assert figure.get_suptitle() == "Reward of every episode, and moving mean"
    assert axes.get_title("left") == "dots: episodes; lines: moving mean of 5 updates"


def test_rewards_far_below_do_not_flatten_the_search(tmp_path):
    far = [episode(i, reward=-9.0) for i in range(8)]
    axes = reward_figure({"agent": [episode(i) for i in range(8)], "random": far}, tmp_path / "a.png").axes[0]
    assert axes.get_ylim()[0] > 0
    assert [line.get_label() for line in axes.lines] == ["agent", "random (below the scale)"]


def test_a_dot_on_the_lower_edge_is_whole(tmp_path):
    """Half of one could be taken for the cross of a failed episode."""
    own, edge = [episode(i) for i in range(8)], 0.5 - 0.07 / 2
    random = [episode(0, reward=edge + 1e-6), episode(1, reward=edge - 1e-6)]
    axes = reward_figure({"agent": own, "random": random}, tmp_path / "a.png").axes[0]
    dots = axes.collections[2]
    assert dots.get_offsets()[:, 1].tolist() == [edge + 1e-6]
    assert not dots.get_clip_on()


def test_under_a_range_no_single_update_stands_for_the_search(tmp_path):
    history = [replace(episode(i), target_sparsity=0.1 + 0.2 * (i // 4 % 2 == 0)) for i in range(8)]
    figure = reward_figure({"agent": history}, tmp_path / "a.png")
    assert figure.get_suptitle() == "Reward of every episode, and mean of every update"
    target = figure.axes[1].lines[0]
    assert (target.get_xdata()[0], target.get_ydata()[0]) == (0, pytest.approx(30)), "the first one has a width"
    (line,) = figure.axes[0].lines
    assert line.get_ydata() == pytest.approx([0.515, 0.555]), "each update, of a target of its own, has its own mean"
    assert line.get_linestyle() == "None"


def test_allocations_are_drawn_as_the_mean_of_every_update(tmp_path):
    half = Allocation((1, 32) * 4, 0, 1)
    history = [replace(episode(i), kept=(2, 64) * 4 if i % 2 else half.kept) for i in range(8)]
    figure = allocations_figure(SUBLAYERS, history, "Title", tmp_path / "a.png")
    for axes in figure.axes[:2]:
        assert axes.images[0].get_array().shape == (4, 2), "layers, updates"
        assert set(axes.images[0].get_array().ravel()) == {75.0}


def test_a_forest_plot_shows_every_interval_and_ties_hollow(tmp_path):
    some = [
        ("better", Difference(-0.1, 0.02)),
        ("tied", Difference(0.01, 0.02)),
        ("unknown", Difference(0.1, math.inf)),
    ]
    (axes,) = differences_figure(some, "fisher", tmp_path / "a.png").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["better", "tied", "unknown"]
    fills = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"]
    assert fills[0] != "white"
    assert fills[1:] == ["white", "white"]

    far = [
        ("worse", Difference(0.1, 0.02)),
        ("far worse", Difference(0.9, 0.05)),
        ("far tie", Difference(-0.9, 1.0)),
    ]
    (axes,) = differences_figure([*some, *far], "fisher", tmp_path / "b.png").axes
    worse, tie = (line for line in axes.lines if line.get_marker() in ("<", ">"))
    assert [worse.get_marker(), worse.get_ydata()[0], tie.get_marker(), tie.get_ydata()[0]] == [">", 4, "<", 5]
    assert (worse.get_markerfacecolor() == "white", tie.get_markerfacecolor() == "white") == (False, True)
    assert 0.1 < axes.get_xlim()[1] < 0.3


@pytest.mark.parametrize(
    "means",
    [(0.038, 0.002, 0.0), (0.038, 0.002, 0.001, 0.001), (0.002, 0.0, 0.0), (0.038, 1e-7, 1e-7), (0.01, 0.08), (0.0,)],
    ids=str,
)
def test_what_differs_from_ties_and_copies_is_not_off_scale(tmp_path, means):
    some = [Difference(mean, 0.0 if mean < 1e-6 else 0.003) for mean in means]
    (axes,) = differences_figure([(str(found), found) for found in some], "first", tmp_path / "a.png").axes
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == list(means)


def test_failed_episodes_of_any_reward_are_drawn(tmp_path):
    failed = [episode(i, reward=reward, failed=True) for i, reward in enumerate((float("nan"), float("-inf"), -1e9))]
    figure = reward_figure({"agent": failed, "random": [*failed, episode(4)]}, tmp_path / "reward.png")
    axes = figure.axes[0]
    drawn = [len(dots.get_offsets()) for dots in axes.collections]
    assert drawn == [0, 3, 1, 3], "episodes and crosses of each search"
    means = {line.get_label(): len(line.get_ydata()) for line in axes.lines}
    assert (means["agent"], means["random"]) == (0, 1)


def test_a_picture_that_cannot_be_written_names_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/kept\.png"):
        units_kept_figure(SUBLAYERS, {"found": FOUND}, tmp_path / "file" / "kept.png")


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: units_kept_figure(SUBLAYERS, {"found": FOUND, "uniform": UNIFORM}, path),
        lambda path: reward_figure({"agent": [episode(i, 0.05 + i / 100) for i in range(8)]}, path),
        lambda path: allocations_figure(SUBLAYERS, [episode(i) for i in range(8)], "20 %", path),
        lambda path: differences_figure([("some", Difference(0.1, 0.02))], "fisher", path),
    ],
    ids=["units kept", "reward", "allocations", "differences"],
)
def test_the_callers_style_changes_no_picture_and_stays_as_it_is(tmp_path, dark_style, draw):
    draw(tmp_path / "plain.png")
    with dark_style:
        before = dict(matplotlib.rcParams.copy())
        draw(tmp_path / "dark.png")
        assert dict(matplotlib.rcParams.copy()) == before
    assert (tmp_path / "dark.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_drawing_needs_no_screen_and_leaves_pyplot_alone():
    code = (
        "import sys; from ffgym.report import card, figures, table; assert 'matplotlib' not in sys.modules;"
        "assert 'torch' not in sys.modules; figures.new_figure(1, 1); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
