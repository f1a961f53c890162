"""RunConfig: everything that decides a run, one pydantic table per stage.

The tables ``criterion``, ``reward``, ``agent``, ``prior`` and ``recover`` name a plugin and keep its options raw: the
plugin's own ``Config`` validates them (`ffgym.plugins.manager.create`). All other tables refuse keys they do not know.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from ffgym.config.mixture import EXAMPLE, Corpora, checked, shares
from ffgym.errors import ConfigError
from ffgym.files import Positive, Strict
from ffgym.types import JSONDict, Ramp

# TOML has no null: an empty string says "not given", in the file and in what `to_toml` prints.
NotGiven = BeforeValidator(lambda value: None if value == "" else value)
OptionalText = Annotated[str | None, NotGiven]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[Corpora, BeforeValidator(checked)]
OptionalShare = Annotated[Annotated[float, Field(gt=0, lt=1)] | None, NotGiven]
OptionalPositive = Annotated[Positive | None, NotGiven]
CLOSEST_TARGETS = 2e-6  # of a front, whose files are named after its targets, in six decimals


def _count(value: Any) -> Any:
    """``"1M"`` -> 1000000; what is no text is left to the validation."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", value)
    if match is None:
        raise ValueError("should be a whole number, also as 500k or 1M")
    return round(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]])


class PluginTable(BaseModel):
    """A table that names a plugin; every key that is no field is an option that the plugin's ``Config`` validates.

    Attributes:
        named_by: the key that names the plugin.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    named_by: ClassVar[str] = "name"

    @property
    def options(self) -> JSONDict:
        """The keys that are no fields, as they were written."""
        return dict(self.model_extra or {})


class ModelTable(Strict):
    """Which model to prune, in which dtype, on which device."""

    name: Text = Field(default="demo", description="demo, a hub id, a folder, or a .gguf file")
    revision: OptionalText = Field(default=None, description="hub branch, tag or commit; empty for the default")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto (what the device is fast at) | float32 | bfloat16 | float16"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|balanced|(cpu|cuda|mps|xpu)(:\d+)?)$",
        description="auto | cpu | cuda | cuda:1 | mps | xpu | balanced (layers spread over all GPUs)",
    )
    placement: Literal["auto", "resident", "stream"] = Field(
        default="auto", description="auto (resident where it fits) | resident | stream (layers are read as they run)"
    )


class DataTable(Strict):
    """The three splits, which never touch."""

    calibration: Texts = Field(
        default="demo:c4", description=f"corpus for statistics and refit, or a mixture of several: {EXAMPLE}"
    )
    search: Texts = Field(default="demo:c4", description="corpus for rewards, or a mixture")
    report: Texts = Field(
        default="demo:wiki", description="corpus for the final table, or a mixture; nothing is selected by it"
    )
    window: int = Field(default=1024, ge=2, description="tokens in one window, at least 2")
    calibration_tokens: Positive = Field(
        default=32768, description="size of the calibration split, at least one window"
    )
    search_tokens: Positive = Field(
        default=131072, description="size of the search split; episodes and finals draw from it"
    )
    report_tokens: Positive = Field(default=16384, description="size of the report split, at least one window")
    bos: Literal["every", "first"] = Field(
        default="every",
        description="which windows begin with BOS, where the tokenizer adds one: every (as prompts do) | first (only "
        "that of a text, as in most papers)",
    )

    def whole_tokens(self, role: str) -> int:
        """Tokens of the split of a role, which has whole windows: at least as many as were asked for."""
        asked: int = getattr(self, f"{role}_tokens")
        return -(-asked // self.window) * self.window

    @model_validator(mode="after")
    def _every_corpus_has_a_window(self) -> DataTable:
        for role in ("calibration", "search", "report"):
            windows = self.whole_tokens(role) // self.window
            for name, share in shares(getattr(self, role)).items():
                if share * windows < 1:
                    raise ConfigError(
                        f"data.{role} gives {name!r} {float(100 * share):.3g}% of {windows} windows, less than one",
                        hint=f"Give it more weight, raise data.{role}_tokens, or leave it out.",
                    )
        return self


NO_SPARSITY = "should be a valid number, or two for a range of budgets, e.g. '0.1:0.5'"


def _sparsity(value: Any) -> float | str:
    """A share in (0, 1), or two of them as ``"low:high"``, written in one way."""
    if not isinstance(value, str):
        return _share(value)
    ends = value.split(":")
    try:
        low, high = (round(float(end), 6) for end in ends)
    except ValueError:
        raise ValueError(NO_SPARSITY) from None
    _share(low)
    _share(high)
    if low == high:
        raise ValueError(f"should have two different ends; a single target is written {low}")
    if low > high:
        raise ValueError(f"should rise: write '{high}:{low}'")
    return f"{low}:{high}"


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(NO_SPARSITY)
    if not -math.inf < value < math.inf:  # also of whole numbers too large for a float
        raise ValueError("should be a finite number")
    if value <= 0:
        raise ValueError("should be greater than 0")
    if value >= 1:
        raise ValueError("should be less than 1")
    return float(value)


class PruneTable(Strict):
    """How much to remove, and how the rest is refitted during the search."""

    sparsity: Annotated[float | str, PlainValidator(_sparsity)] = Field(
        default=0.2,
        description="share of the resource to remove, between 0 and 1, exclusive; or a range of them, e.g. '0.1:0.5'",
    )
    front_points: int = Field(
        default=5,
        ge=2,
        le=100,
        description="with a range: number of targets at which the front is measured, at most 100",
    )
    resource: Text = Field(default="params", description="what the budget counts; see: ffgym ls resources")
    calibration: Text = Field(
        default="ridge", description="the refit that the reward sees: ridge, affine, none; see: ffgym ls calibrations"
    )
    ridge: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        default="auto", description="auto (chosen on held-out calibration windows) or a strength above 0"
    )
    min_units: int = Field(
        default=1, ge=0, description="units that every sublayer keeps at least; 0 allows removing a whole sublayer"
    )
    context: Positive = Field(
        default=1024, description="context length in tokens at which MACs are counted and latency is timed"
    )
    align: Literal["auto"] | Positive = Field(
        default="auto",
        description="keep multiples of this many channels, e.g. 8 or 64; 1: any number; auto: widths of MLPs that "
        "kernels like, multiples of at most 64",
    )
    uniform: bool = Field(
        default=False, description="one shape for all layers, saved as a stock checkpoint that needs no code of its own"
    )
    latency_table: OptionalText = Field(
        default=None,
        description="file that ffgym latency wrote, with the times that the budget or the reward counts; empty: time "
        "this machine once",
    )

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of a range of budgets, lower first; twice the target where there is only one."""
        low, _, high = str(self.sparsity).partition(":")
        return float(low), float(high or low)

    @property
    def is_range(self) -> bool:
        """Whether the search is for a range of budgets."""
        return isinstance(self.sparsity, str)

    @property
    def target(self) -> float:
        """The target, or the middle of a range."""
        return sum(self.ends) / 2


class CriterionTable(PluginTable):
    """The criterion, and its own options."""

    name: Text = Field(
        default="wanda", description="decides which units of a sublayer are removed first; see: ffgym ls criteria"
    )


class RewardTable(PluginTable):
    """The reward, and its own options."""

    name: Text = Field(default="perplexity", description="what an episode earns; see: ffgym ls rewards")


class AgentTable(PluginTable):
    """The agent, and its own options; a heuristic's name stands for one-shot with that prior."""

    name: Text = Field(
        default="reinforce", description="the search algorithm; see: ffgym ls agents; or a heuristic's name"
    )


class PriorTable(PluginTable):
    """Where the agent starts: a heuristic, and its own options."""

    name: Text = Field(default="mlp-first", description="heuristic to start from, or none; see: ffgym ls heuristics")


class SearchTable(Strict):
    """The length of the search, and what to compare it with."""

    episodes: Positive = Field(
        default=48,
        description="length of the search in episodes at full fidelity: it ends with the update that reaches "
        "episodes x episode_tokens tokens; an episode that follows a slope costs four times its tokens",
    )
    episode_tokens: Positive = Field(
        default=2048,
        description="search tokens that one episode is measured on, at least one window; rounded up to windows",
    )
    episodes_per_update: Positive = Field(default=8, description="episodes that one policy update learns from")
    finalists: Positive = Field(default=8, description="allocations that are measured again before one is chosen")
    final_tokens: Positive = Field(
        default=16384,
        description="search tokens that are reserved for the finals, rounded down to windows, half to thin out and "
        "half to decide; with less than 3 windows, nothing replaces what the agent recommends",
    )
    init_from: OptionalText = Field(
        default=None, description="run folder, policy.json or MLflow run id whose policy to start from; or empty"
    )
    random_baseline: bool = Field(
        default=True, description="also measure random allocations with as many tokens; not with a range of budgets"
    )


class ScheduleTable(Strict):
    """How the search gets harder: ramps over the token budget, or over episodes."""

    sparsity: Ramp = Field(default="none", description="none | cubic | staircase: how sparsity rises to its target")
    sparsity_start: float = Field(
        default=0.05, gt=0, lt=1, description="the ramp's first sparsity, above 0, at most prune.sparsity"
    )
    fidelity: Ramp = Field(
        default="none", description="none | cubic | staircase: how the measured share of episode_tokens rises to 1"
    )
    ramp_episodes: OptionalPositive = Field(
        default=None, description="number of episodes that the ramps take; empty: half of the tokens"
    )


class RecoverTable(PluginTable):
    """Training after the final calibration, and the method's own options; `ffgym recover` reads it too."""

    named_by = "method"

    method: Text = Field(default="none", description="how to train the pruned model, or none; see: ffgym ls recoveries")
    corpus: OptionalText = Field(
        default=None, description="corpus to train on; empty: data.calibration, without the text of other splits"
    )
    tokens: Annotated[Positive, BeforeValidator(_count)] = Field(
        default=524288, description="tokens to learn from, all epochs together; also 500k or 1M"
    )
    batch_tokens: Annotated[Positive, BeforeValidator(_count)] = Field(
        default=4096, description="tokens of one optimiser step, at least one window"
    )
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = Field(
        default="auto", description="auto (the method's own) or the highest rate of the schedule, in (0, 1]"
    )
    held_out_tokens: Annotated[Positive, BeforeValidator(_count)] = Field(
        default=8192, description="held-out search tokens on which the weights to keep are chosen"
    )
    evaluate_every: Positive = Field(default=16, description="steps between measurements on held-out tokens")


class OutputTable(Strict):
    """Where results are written."""

    dir: OptionalText = Field(default=None, description="folder for the results; empty makes a new one under runs/")
    overwrite: bool = Field(default=False, description="replace the contents of a folder that is not empty")
    save_model: bool = Field(default=True, description="save the pruned model")
    save_at: OptionalShare = Field(
        default=None, description="with a range: the target whose model is saved; empty: the point in the middle"
    )
    save_all: bool = Field(default=False, description="with a range: save the model of every point of the front")


class TrackingTable(Strict):
    """MLflow."""

    enabled: bool = Field(default=True, description="log the run to MLflow")
    experiment: Text = Field(default="ffgym", description="MLflow experiment")
    root: Text = Field(default="mlruns", description="folder of the store; MLFLOW_TRACKING_URI overrides it")

    @property
    def folder(self) -> Path:
        """``root`` as a path, ``~`` spelled out."""
        return Path(self.root).expanduser()


class WorkersTable(Strict):
    """Who measures; the numbers are the same."""

    count: Positive = Field(default=1, description="processes that measure episodes; more than 1 need the extra 'ray'")
    ray_address: OptionalText = Field(
        default=None, description="Ray cluster: auto, HOST:PORT or ray://HOST:PORT; empty starts one on this machine"
    )
    gpus: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="GPUs of a worker; auto (1 where the model runs on one, else 0)"
    )


class RunConfig(Strict):
    """Everything that decides a run. ``RunConfig()`` is the demo."""

    seed: int = Field(default=0, ge=0, lt=2**32, description="source of all randomness, from 0 to 2**32 - 1")
    model: ModelTable = Field(default_factory=ModelTable)
    data: DataTable = Field(default_factory=DataTable)
    prune: PruneTable = Field(default_factory=PruneTable)
    criterion: CriterionTable = Field(default_factory=CriterionTable)
    reward: RewardTable = Field(default_factory=RewardTable)
    agent: AgentTable = Field(default_factory=AgentTable)
    prior: PriorTable = Field(default_factory=PriorTable)
    search: SearchTable = Field(default_factory=SearchTable)
    schedule: ScheduleTable = Field(default_factory=ScheduleTable)
    recover: RecoverTable = Field(default_factory=RecoverTable)
    output: OutputTable = Field(default_factory=OutputTable)
    tracking: TrackingTable = Field(default_factory=TrackingTable)
    workers: WorkersTable = Field(default_factory=WorkersTable)

    @model_validator(mode="after")
    def _tables_agree(self) -> RunConfig:
        """Refuse combinations of tables that cannot run."""
        data, search, schedule = self.data, self.search, self.schedule
        for key in ("data.calibration_tokens", "data.report_tokens", "search.episode_tokens", "search.final_tokens"):
            table, _, name = key.partition(".")
            _at_least(key, getattr(getattr(self, table), name), "one window: data.window", data.window)
        both = search.episode_tokens + search.final_tokens
        _at_least("data.search_tokens", data.search_tokens, "search.episode_tokens + search.final_tokens", both)
        if schedule.sparsity != "none" and not self.prune.is_range:
            _at_least("prune.sparsity", self.prune.target, "schedule.sparsity_start", schedule.sparsity_start)
        if self.prune.uniform and self.prune.min_units == 0:
            raise ConfigError(
                "prune.uniform = true with prune.min_units = 0: a stock checkpoint cannot have empty sublayers",
                hint="Set prune.min_units to 1 or more, or leave --uniform out.",
            )
        self._range_agrees()
        self._recovery_fits()
        return self

    @property
    def searches(self) -> bool:
        """Whether an agent searches; ``False`` where the prior's heuristic is measured as it is."""
        return self.agent.name != "one-shot"

    @property
    def episode_windows(self) -> int:
        """Windows of text of an episode at full fidelity."""
        return -(-self.search.episode_tokens // self.data.window)

    @property
    def final_windows(self) -> int:
        """Windows of text that are reserved for the finals."""
        return self.search.final_tokens // self.data.window

    @property
    def targets(self) -> tuple[float, ...]:
        """The target, or under a range the points of the front, rising; ``output.save_at`` is one of them."""
        if not self.prune.is_range:
            return (self.prune.target,)
        (low, high), steps = self.prune.ends, self.prune.front_points - 1
        grid = {low, *(round(low + (high - low) * step / steps, 6) for step in range(1, steps)), high}
        save_at = self.output.save_at
        if save_at is not None:  # replaces a point that would have the same name
            grid = {point for point in grid if abs(point - save_at) > CLOSEST_TARGETS} | {save_at}
        return tuple(sorted(grid))

    @property
    def main_target(self) -> float:
        """The target; under a range ``output.save_at``, or else the point in the middle of the front."""
        return self.targets[len(self.targets) // 2] if self.output.save_at is None else self.output.save_at

    def _range_agrees(self) -> None:
        """Refuse what makes no sense under a range of budgets, or only there."""
        (low, high), save_at = self.prune.ends, self.output.save_at
        if not self.prune.is_range:
            for key, asked in (("output.save_at", save_at is not None), ("output.save_all", self.output.save_all)):
                if asked:
                    raise ConfigError(
                        f"{key} chooses among the points of a range, and prune.sparsity = {self.prune.sparsity} is a "
                        "single target",
                        hint="Give a range, e.g. --sparsity 0.1:0.5, or leave it out.",
                    )
            return
        where = f"prune.sparsity = {self.prune.sparsity!r} gives every update a target of its own"
        if self.schedule.sparsity != "none":
            raise ConfigError(
                f"{where}, so schedule.sparsity = {self.schedule.sparsity!r} has none to rise to",
                hint='Set schedule.sparsity = "none", or search at one target.',
            )
        if save_at is not None and not low <= save_at <= high:
            raise ConfigError(
                f"output.save_at = {save_at} is outside the range {self.prune.sparsity}",
                hint=f"Give a target from {low} to {high}.",
            )
        if save_at is not None and self.output.save_all:
            raise ConfigError(
                f"output.save_at = {save_at} saves one model and output.save_all every point's",
                hint="Give one of them.",
            )

    def _recovery_fits(self) -> None:
        recover = self.recover
        if recover.method == "none":
            return
        if self.model.dtype == "float16":
            raise ConfigError(
                f"recover.method = {recover.method!r} would train in model.dtype = 'float16', whose small gradients "
                "vanish",
                hint='Set model.dtype = "bfloat16" or "float32".',
            )
        _at_least("recover.batch_tokens", recover.batch_tokens, "one window: data.window", self.data.window)
        _at_least("recover.tokens", recover.tokens, "one step: recover.batch_tokens", recover.batch_tokens)
        if not self.output.save_model:
            raise ConfigError(
                f"recover.method = {recover.method!r} trains the saved model, and output.save_model = false saves none",
                hint="Leave output.save_model out, or set recover.method to none.",
            )


def _at_least(key: str, value: float, bound_name: str, bound: float) -> None:
    if value < bound:
        bound_key = bound_name.rpartition(" ")[2]
        raise ConfigError(
            f"{key} = {value} is less than {bound_name} = {bound}", hint=f"Raise {key} or lower {bound_key}."
        )


def table_model(name: str) -> type[BaseModel]:
    """The model of a table of :class:`RunConfig`."""
    model = RunConfig.model_fields[name].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model


PLUGIN_TABLES = {
    name: model
    for name in RunConfig.model_fields
    if name != "seed" and issubclass(model := table_model(name), PluginTable)
}
"""The tables that name a plugin, by their names."""
