"""A simulation of searches on the demo model's shape, to try the parts of `reinforce` one by one and together.

    python experiments/development/simulate.py [SEEDS] [TOKENS]

The loss of an allocation, in nats: a parabola in the realised importances of the MLPs, plus what lost KV groups cost,
of a heavy tail, several together more than their sum, less what the channels are worth that a lost group pays for.
Every window adds noise to the slopes and to the groups' costs. Sizes are set by hand to what logged searches of the
demo model show: half differences of mirrored pairs (12 to 14 mnats), noise of slopes (30 mnats on two windows), gains.
It ranks variants; it predicts no perplexity. Prints mnats gained over the prior, mean and standard error over worlds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from ffgym.agents.averaging import tail_mean
from ffgym.agents.exploration import depth_covariance, square_root
from ffgym.agents.pathwise import SlopeDescent
from ffgym.agents.reinforce import pair_advantages
from ffgym.pruning.budget import Budget
from ffgym.types import Sublayer

LAYERS, POOL, BATCH, SUPERADDITIVE = 30, 96, 8, 0.15
SUBLAYERS = [
    each
    for layer in range(LAYERS)
    for each in (Sublayer(layer, "attention", 3, 192, 294_912, 1), Sublayer(layer, "mlp", 1536, 1, 1728, 1))
]
BUDGET = Budget(SUBLAYERS)
UNITS = np.array([sublayer.units for sublayer in SUBLAYERS])
MLP = np.arange(2 * LAYERS) % 2 == 1
# By sparsity: scale of the gain (nats), of the way to the optimum (importance), worth of one KV group's parameters.
SCALES = {0.2: (0.12, 0.5, 0.006), 0.4: (0.06, 0.25, 0.009), 0.5: (0.08, 0.25, 0.0125)}


@dataclass(frozen=True)
class Variant:
    """A way to search: shares, steps, and which parts are on."""

    slope_share: float = 0.0
    rate: float = 2.0
    spread: float = 0.15
    smooth: float = 0.95
    windows: int = 2
    pair_text: bool = False
    credit: bool = False
    coarse_only: bool = False


NEW = Variant(0.5, 1.0, 0.225, 0.3, 2, pair_text=True, credit=True, coarse_only=True)
VARIANTS = {
    "before: one text, no credit, no slopes": Variant(),
    "+ credit": Variant(credit=True),
    "+ text of each pair's own": Variant(pair_text=True),
    "+ half the step": Variant(rate=1.0),
    "+ one window": Variant(windows=1),
    "all four": Variant(0.0, 1.0, windows=1, pair_text=True, credit=True),
    "all four after 12.5 % of slopes": Variant(0.125, 1.0, windows=1, pair_text=True, credit=True),
    "slopes, then coarse sublayers (reinforce now)": NEW,
    "  the same, twice the step": Variant(0.5, 2.0, 0.225, 0.3, 2, True, True, True),
    "  the same, one text": Variant(0.5, 1.0, 0.225, 0.3, 2, False, True, True),
    "  the same, no credit": Variant(0.5, 1.0, 0.225, 0.3, 2, True, False, True),
    "slopes to the end (pathwise)": Variant(1.0),
}


class World:
    """One random loss at a sparsity, and windows of text."""

    def __init__(self, sparsity: float, seed: int) -> None:
        rng = np.random.default_rng([seed, 77])
        self.sparsity = sparsity
        wanted = np.array([1.0 if s.kind == "attention" or not 3 <= s.layer < LAYERS - 1 else -1.0 for s in SUBLAYERS])
        self.prior = BUDGET.importance(BUDGET.project(wanted, sparsity).kept).astype(np.float64)
        gain, way, self._worth = SCALES[sparsity]
        layer = np.arange(LAYERS)
        pattern = np.select([layer < 3, layer < 10, layer < 19], [0.5, -0.3, 1.0], -0.9)
        pattern = pattern + 0.3 * rng.standard_normal(LAYERS)
        self._bend, self._slope = np.zeros(2 * LAYERS), np.zeros(2 * LAYERS)
        self._bend[MLP] = 2 * gain / LAYERS / way**2 * np.exp(0.4 * rng.standard_normal(LAYERS))
        self._slope[MLP] = self._bend[MLP] * pattern * way
        self._slope[MLP] -= self._slope[MLP][3 : LAYERS - 1].mean()
        self._groups = rng.gamma(0.7, 0.034, LAYERS)
        rng = np.random.default_rng([seed, 9])
        common, own = 0.6 * rng.standard_normal((POOL, 1)), rng.standard_normal((POOL, LAYERS))
        self._slope_noise = np.zeros((POOL, 2 * LAYERS))
        self._slope_noise[:, MLP] = 0.027 * (0.75 * own + common)
        self._group_noise = 0.012 * rng.standard_normal((POOL, LAYERS))

    def kept(self, importance: np.ndarray) -> np.ndarray:
        """What the projection makes of importances."""
        return np.array(BUDGET.project(np.clip(importance, -1, 1).astype(np.float32), self.sparsity).kept)

    def loss(self, kept: np.ndarray, windows: np.ndarray | None = None) -> float:
        """Above the prior's, in nats, on windows or on all text there is."""
        moved, lost = 2 * kept / UNITS - 1 - self.prior, 3 - kept[::2]
        slope, groups = self._slope, self._groups
        if windows is not None:
            slope = slope + self._slope_noise[windows].mean(axis=0)
            groups = groups + self._group_noise[windows].mean(axis=0)
        attention = (lost * groups + 0.5 * self._groups * lost * (lost - 1)).sum()
        attention *= 1 + SUPERADDITIVE * max(0, lost.sum() - 1)
        worth = moved[MLP].sum() * self._worth * 1536 / (2 * 171)
        return float(moved @ slope + 0.5 * self._bend @ moved**2 + attention - worth)

    def slopes(self, kept: np.ndarray, windows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """By the importances of MLPs, what they have in common taken out; nothing of attention."""
        moved = 2 * kept / UNITS - 1 - self.prior
        found = self._slope + self._slope_noise[windows].mean(axis=0) + self._bend * moved
        found = found + 0.03 / np.sqrt(len(windows)) * rng.standard_normal(len(UNITS))
        return np.where(MLP, found - found[MLP].mean(), 0.0)


def gained(variant: Variant, sparsity: float, seed: int, tokens: int) -> float:
    """Mnats that a search gains over its prior."""
    world, rng = World(sparsity, seed), np.random.default_rng([seed, 5])
    mean, means, spent, budget = world.prior.copy(), list[np.ndarray](), 0, tokens // 1024
    descent = SlopeDescent(2 * LAYERS)
    root = variant.spread * square_root(depth_covariance(2 * LAYERS, smooth=variant.smooth))
    root = root * ~MLP if variant.coarse_only else root
    follows, pairs = False, BATCH // 2

    def drawn() -> np.ndarray:
        return rng.choice(POOL, variant.windows, replace=False)

    while spent < budget:
        if spent < variant.slope_share * budget:
            follows = True
            mean = np.clip(mean - descent.step(world.slopes(world.kept(mean), drawn(), rng)), -1, 1)
            spent += 4 * variant.windows
        else:
            if follows:
                follows, mean, means = False, tail_mean(means, 0.5), []
            noise = rng.standard_normal((pairs, 2 * LAYERS)) @ root
            kept = [world.kept(mean + step) for step in (*noise, *-noise)]
            texts = [drawn() for _ in range(pairs)] * 2 if variant.pair_text else [drawn()] * BATCH
            rewards = np.array([np.exp(-1 - world.loss(k, text)) for k, text in zip(kept, texts, strict=True)])
            moved = np.array(kept[:pairs]) != np.array(kept[pairs:]) if variant.credit else np.ones((pairs, 1))
            step = (pair_advantages(rewards)[:, None] * moved * noise).mean(axis=0)
            mean = np.clip(mean + variant.rate * step, -1, 1)
            spent += BATCH * variant.windows
        means.append(mean.copy())
    return -1000 * world.loss(world.kept(tail_mean(means, 0.5)))


def main(seeds: int = 8, tokens: int = 393_216) -> None:
    """Print the table."""
    print(f"| {seeds} worlds, {tokens:,} tokens | " + " | ".join(f"{p:.0%}" for p in SCALES) + " |")
    print("|---|" + "---:|" * len(SCALES))
    for label, variant in VARIANTS.items():
        cells = []
        for sparsity in SCALES:
            values = np.array([gained(variant, sparsity, seed, tokens) for seed in range(seeds)])
            cells.append(f"{values.mean():.1f} ± {values.std(ddof=1) / np.sqrt(seeds):.1f}")
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
