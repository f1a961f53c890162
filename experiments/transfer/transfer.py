"""Does a search reward carry over to downstream accuracy? The paper's second open question, by measurement.

    python experiments/transfer/transfer.py experiments/transfer/demo.toml            # what is missing, then the report
    python experiments/transfer/transfer.py experiments/transfer/demo.toml --report   # compute nothing

1. Search with every reward, on equal tokens.
2. Take candidates of one size: heuristics, each search's winner, and allocations spread over its history by quality.
3. Measure all of them on the same search text, the same search examples, and questions that no search has seen.
4. Correlate each reward with the accuracy on those questions; compare the searches' winners on them.

Every search has its log, and every candidate is one JSON line in ``results/candidates.jsonl``: what is there is not
computed again. The figure and the tables are made from these files alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analysis import Analysis, analyse, figure, markdown
from pydantic import Field, ValidationError
from rich.console import Console

from ffgym.config.refusals import config_error
from ffgym.config.tables import RunConfig
from ffgym.config.toml import read_toml
from ffgym.costs.resource import standard_resources
from ffgym.data import task_data
from ffgym.data.examples import PROMPTS, EncodedExample, Prompt, Row, encode, examples_of
from ffgym.envs.pruning_env import PruningEnv, Trial
from ffgym.errors import DataError, FFGymError
from ffgym.evaluation.multiple_choice import batches, padded, right_answers
from ffgym.files import Strict
from ffgym.pipeline import task
from ffgym.pipeline.agent import make_agent
from ffgym.pipeline.search import tracked_search
from ffgym.pipeline.start import check_plugins, settle
from ffgym.plugins.bases import Reward
from ffgym.prepare.parts import budget_in, examples_for, make_reward
from ffgym.report.progress import Reporter
from ffgym.search.log import read_log
from ffgym.tracking.tracker import Tracker
from ffgym.types import Episode, Evaluation, JSONDict

TEXT_SEED, EXAMPLES_SEED = 104_729, 15_485_863  # draws that no search makes


def _piqa(row: Row) -> tuple[str, list[str], int]:
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]


def _sciq(row: Row) -> tuple[str, list[str], int]:
    answers = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", answers, 3


# lm-eval's, of what can be reported: those of a search, and two of which ffgym has the reported split alone.
REPORTED: dict[str, Prompt] = {**PROMPTS, "piqa": _piqa, "sciq": _sciq}


class Settings(Strict):
    """The TOML file.

    Attributes:
        title: what the tables are called.
        results: folder of the logs and JSON lines, relative to the file.
        seeds: of the searches; one search per reward and seed.
        per_search: candidates taken from each search, its winner among them.
        heuristics: candidates by rule.
        text_tokens: search text that every candidate is measured on again.
        search_examples: search examples that every candidate is measured on again.
        report: task -> questions that accuracy is reported on.
        rewards: what searches are run with, by label: tables as ``[reward]``.
        judges: rewards that are only correlated with accuracy.
        run: tables of ``RunConfig`` that all searches share.
        dated: when earlier code computed the results: they are shown, and nothing is checked or computed.
    """

    title: str
    results: str
    seeds: list[int] = Field(min_length=1)
    per_search: int = Field(ge=1)
    heuristics: list[str]
    text_tokens: int = Field(ge=1)
    search_examples: int = Field(ge=1)
    report: dict[str, int] = Field(min_length=1)
    rewards: dict[str, dict[str, Any]] = Field(min_length=1)
    judges: dict[str, dict[str, Any]] = Field(default_factory=dict)
    run: dict[str, Any] = Field(default_factory=dict)
    dated: str = ""

    @property
    def digest(self) -> str:
        """Of all that decides the numbers."""
        content = self.model_dump(exclude={"title", "results", "dated"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def config(self, reward: str, seed: int) -> RunConfig:
        """The run behind one search."""
        table = (self.rewards | self.judges)[reward]
        tables = {**self.run, "reward": table, "seed": seed}
        tables["tracking"] = {**self.run.get("tracking", {}), "enabled": False}
        return RunConfig.model_validate(tables)


@dataclass(frozen=True)
class Candidate:
    """One allocation to measure.

    Attributes:
        label: e.g. ``"perplexity, seed 0, episode 12"``.
        source: the label of the reward whose search it is from, ``"heuristic"`` or ``"dense"``.
        seed: of that search.
        winner: the search chose it.
        kept: units per sublayer.
        seen: (pruned, dense) loss when the search measured it, on the few tokens of that update.
    """

    label: str
    source: str
    kept: tuple[int, ...]
    seed: int | None = None
    winner: bool = False
    seen: tuple[float, float] | None = None


class Everything(Reward):
    """Not a reward: asks for all that the compared rewards need, so that one pass serves all of them."""

    name = "everything"
    needs = frozenset({"kl", "reverse_kl", "accuracy", "cost"})

    def __init__(self, rewards: Sequence[Reward], examples: int) -> None:
        super().__init__()
        self.needs = frozenset[str]().union(*(reward.needs for reward in rewards))
        self.tasks = next((reward.tasks for reward in rewards if "accuracy" in reward.needs), ())
        self.examples = examples

    def __call__(self, pruned: Evaluation, dense: Evaluation) -> float:
        return 0.0


class Bench:
    """The prepared model, and everything that candidates are measured on."""

    def __init__(self, settings: Settings, reporter: Reporter) -> None:
        self.settings, self.reporter = settings, reporter
        config = settings.config(next(iter(settings.rewards)), settings.seeds[0])
        rules: list[tuple[str, JSONDict]] = [(name, {}) for name in settings.heuristics]
        prior = [] if config.prior.name == "none" else [(config.prior.name, config.prior.options)]
        self.space = task.open_task(config, [*rules, *prior], reporter)
        self.rewards = {
            label: make_reward(settings.config(label, 0)) for label in (*settings.rewards, *settings.judges)
        }
        everything = Everything(list(self.rewards.values()), settings.search_examples)
        loaded, env = self.space.loaded, self.space.env
        priced = standard_resources() if "cost" in everything.needs else ()
        self.env = PruningEnv(
            env.prunable,
            everything,
            env.windows,
            env.budget,
            sparsity=env.sparsity,
            episode_windows=min(len(env.windows), max(1, settings.text_tokens // env.window_tokens)),
            calibrated=env.calibrated,
            tokens_per_batch=env.tokens_per_batch,
            examples=examples_for(everything, loaded),
            prices={name: budget_in(name, config, loaded.model) for name in priced},
        )
        self.text = self.env.draw(np.random.default_rng(TEXT_SEED), self.env.episode_windows)
        self.examples = self.env.draw_examples(np.random.default_rng(EXAMPLES_SEED), self.env.episode_windows)
        self.questions = {task: self._questions(task, count) for task, count in settings.report.items()}

    def _questions(self, task: str, count: int) -> list[EncodedExample]:
        """A draw of a task's reported questions."""
        rows = task_data.task_dataset(task)[task_data.reported_split(task)]
        found = examples_of(task, rows, REPORTED[task])
        chosen = np.sort(np.random.default_rng([EXAMPLES_SEED, len(task)]).choice(len(found), count, replace=False))
        loaded = self.space.loaded
        return [encode(found[i], loaded.tokenizer, context_limit=loaded.context_limit) for i in chosen]

    @property
    def tokens_per_candidate(self) -> int:
        """Tokens that measuring one candidate takes."""
        asked = sum(question.tokens for questions in self.questions.values() for question in questions)
        return self.env.tokens(self.text, self.examples) + asked

    def measure(self, candidate: Candidate) -> dict[str, Any]:
        """One JSON line."""
        begun = time.monotonic()
        prunable, batch = self.env.prunable, self.env.tokens_per_batch
        allocation = self.env.budget.allocation(candidate.kept)
        (outcome,) = self.env.outcomes([Trial(allocation, self.text, self.examples)])
        dense, pruned = outcome.dense, outcome.pruned
        right = {}
        with task.cut_to(self.space, candidate.kept, calibrated=self.env.calibrated):
            for name, questions in self.questions.items():
                answers = answered_right(prunable.model, questions, tokens_per_batch=batch)
                right[name] = "".join("1" if answer else "0" for answer in answers)
        return {
            "label": candidate.label,
            "source": candidate.source,
            "seed": candidate.seed,
            "winner": candidate.winner,
            "digest": self.settings.digest,
            "kept": list(candidate.kept),
            "sparsity": allocation.sparsity,
            "seen": candidate.seen,
            "loss": pruned.loss,
            "dense_loss": dense.loss,
            "kl": None if pruned.kls is None else pruned.kl,
            "search_accuracy": pruned.accuracy,
            "rewards": {label: reward(pruned, dense) for label, reward in self.rewards.items()},
            "right": right,
            "tokens": self.tokens_per_candidate,
            "seconds": round(time.monotonic() - begun, 1),
        }


@torch.inference_mode()
def answered_right(model: Any, questions: Sequence[EncodedExample], tokens_per_batch: int) -> list[bool]:
    """Whether the right answer is the likeliest of each question."""
    right = [False] * len(questions)
    for batch in batches(questions, tokens_per_batch):
        asked = [questions[i] for i in batch]
        rows, device = padded(model, asked), model.get_input_embeddings().weight.device
        hidden = model.base_model(
            input_ids=rows.ids.to(device),
            position_ids=rows.positions.to(device),
            attention_mask=rows.mask.to(device),
            use_cache=False,
        ).last_hidden_state
        for index, answer in zip(batch, right_answers(asked, rows.log_likelihoods(model, hidden)), strict=True):
            right[index] = answer
    return right


def run_search(bench: Bench, reward: str, seed: int, folder: Path) -> tuple[dict[str, Any], list[Episode]]:
    """The winner of one search and its history; from the files where they are there."""
    name = f"{reward}-seed{seed}"
    done, log = folder / f"{name}.json", folder / f"{name}.jsonl"
    digest = bench.settings.digest
    if not done.exists():
        config = bench.settings.config(reward, seed)
        space = task.with_config(bench.space, config)
        agent = make_agent(config)
        task.give_prior(agent, space)
        untracked = Tracker(config.tracking.folder, "ffgym", name, enabled=False)
        (found,) = tracked_search(space, agent, bench.reporter, untracked, f"search: {name}", log)
        winner: dict[str, Any] = {
            "digest": digest,
            "kept": list(found.best.allocation.kept),
            "origin": found.best.origin,
        }
        winner |= {"search_tokens": found.search_tokens, "final_tokens": found.final_tokens}
        winner |= {"episodes": len(found.history), "seconds": round(found.seconds, 1)}
        done.write_text(json.dumps(winner) + "\n", encoding="utf-8")
    winner = json.loads(done.read_text(encoding="utf-8"))
    _same_settings(winner, digest, done)
    return winner, list(read_log(log).episodes)


def spread(history: Sequence[Episode], count: int, without: Sequence[tuple[int, ...]]) -> list[Episode]:
    """Distinct allocations from a history, evenly spaced from its worst to its best by loss above dense."""
    first: dict[tuple[int, ...], Episode] = {}
    for episode in history:
        if not episode.failed and episode.kept not in without:
            first.setdefault(episode.kept, episode)
    ranked = sorted(first.values(), key=lambda e: e.loss - e.dense_loss)
    if len(ranked) <= count:
        return ranked
    return [ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, count)] if count > 1 else ranked[:count]


def candidates(bench: Bench, folder: Path) -> list[Candidate]:
    """All allocations to measure, the dense model first."""
    settings, space = bench.settings, bench.space
    chosen = [Candidate("dense", "dense", space.env.prunable.dense_units)]
    for name in settings.heuristics:
        chosen.append(Candidate(name, "heuristic", space.project(name, {}).kept))
    for reward in settings.rewards:
        for seed in settings.seeds:
            winner, history = run_search(bench, reward, seed, folder)
            kept, at = tuple(winner["kept"]), f"{reward}, seed {seed}"
            chosen.append(Candidate(f"{at}, winner", reward, kept, seed, winner=True))
            taken = [candidate.kept for candidate in chosen]
            for e in spread(history, settings.per_search - 1, taken):
                seen = (e.loss, e.dense_loss)
                chosen.append(Candidate(f"{at}, episode {e.index}", reward, e.kept, seed, seen=seen))
    return chosen


def read_rows(path: Path, digest: str | None) -> list[dict[str, Any]]:
    """Lines measured so far; a last line that was cut off by a crash is left out.

    Args:
        digest: of the settings that they have to be of; ``None`` takes any.

    Raises:
        DataError: lines of other settings.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")
        lines.pop()
    rows = [json.loads(line) for line in lines]
    if digest is not None:
        for row in rows:
            _same_settings(row, digest, path)
    return rows


def _same_settings(row: dict[str, Any], digest: str, path: Path) -> None:
    if row["digest"] != digest:
        raise DataError(
            f"{path} holds results of other settings", hint="Point `results` at another folder, or delete it."
        )


def read_settings(file: Path) -> Settings:
    """The TOML file, and every run in it, checked before anything is loaded."""
    try:
        settings = Settings.model_validate(read_toml(file))
        for label in (*settings.rewards, *settings.judges):
            check_plugins(settle(settings.config(label, settings.seeds[0])))
    except ValidationError as error:
        model = RunConfig if error.title == "RunConfig" else Settings
        raise config_error(error, model) from None
    return settings


def run(file: Path, *, only_report: bool = False, progress: Console | None = None) -> Analysis:
    """Measure what is missing, then write ``NAME.json``, ``NAME.md`` and ``NAME.png`` beside the file."""
    reporter = Reporter(progress or Console(stderr=True))
    settings = read_settings(file)
    folder = file.parent / settings.results
    lines = folder / "candidates.jsonl"
    rows = read_rows(lines, None if settings.dated else settings.digest)
    if not only_report and not settings.dated:
        bench = Bench(settings, reporter)
        folder.mkdir(parents=True, exist_ok=True)
        wanted = candidates(bench, folder)
        known = {row["label"] for row in rows}
        with reporter.stage("candidates", len(wanted)) as stage, lines.open("a", encoding="utf-8") as out:
            for candidate in wanted:
                if candidate.label not in known:
                    row = bench.measure(candidate)
                    rows.append(row)
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                stage.advance(1, candidate.label)
    if sum(row["source"] != "dense" for row in rows) < 3:
        raise DataError(f"{lines} holds fewer than 3 candidates", hint="Run without --report to measure them.")
    result = replace(analyse(rows, settings.title), dated=settings.dated)
    result.write(file.with_suffix(".json"))
    file.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    figure(result, rows, file.with_suffix(".png"))
    reporter.print(f"wrote {file.with_suffix('.md')}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="settings, e.g. experiments/transfer/demo.toml")
    parser.add_argument("--report", action="store_true", help="compute nothing, write the report again")
    given = parser.parse_args(arguments)
    try:
        result = run(given.file, only_report=given.report)
    except FFGymError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
