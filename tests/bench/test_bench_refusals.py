"""What a bench refuses before anything is computed: unequal terms, mistyped files, results of another time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import glass_runs
import pytest
from glass_runs import NO_MODEL, glass_home, glass_tables
from latency_tables import made_up_table
from rich.console import Console

from ffgym.bench.bench import bench
from ffgym.bench.cell import Cell, write_result
from ffgym.bench.checks import check_benches
from ffgym.bench.file import read_bench
from ffgym.bench.table import CellResult, Final, Mark
from ffgym.config.toml import settings
from ffgym.costs.latency_table import to_json
from ffgym.errors import ConfigError, OutputError, WorkerError
from ffgym.models.loading import load
from ffgym.pipeline.agent import policy_digest
from ffgym.prepare.configured import editions
from ffgym.prepare.parts import table_digest

pytestmark = pytest.mark.usefixtures("only_builtins")


def bench_file(folder: Path, *, tables: dict[str, Any] | None = None, **spec: Any) -> Path:
    """A bench whose model is not there: nothing can be computed."""
    return glass_runs.bench_file(folder, tables={"model": NO_MODEL, **(tables or {})}, **spec)


def refused(folder: Path, said: str, **spec: Any) -> str | None:
    """The hint of the error that a bench file earns, whose message has ``said`` in it."""
    with pytest.raises(ConfigError, match=said) as raised:
        bench([bench_file(folder, **spec)], progress=Console(quiet=True))
    return raised.value.hint


def test_an_address_is_not_ignored_where_one_cell_is_left(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="'here' is no Ray address"):
        bench([bench_file(tmp_path)], progress=Console(quiet=True), workers=2, ray_address="here")


def a_result(cell: Cell) -> CellResult:
    """What a cell of the small model might have come to."""
    return CellResult(
        label="random",
        agent=cell.config.agent.name,
        editions=editions(cell.config),
        seed=0,
        settings=settings(cell.config),
        target=0.2,
        dense_loss=3.0,
        report_tokens=1008,
        search_tokens=1024,
        final_tokens=1024,
        episodes=8,
        seconds=1.0,
        threads=1,
        dtype="float32",
        asked_marks=6,
        marks=[Mark(tokens=1024, loss=4.0)],
        final=Final(kept=[1], loss=4.0, sparsity=0.2, origin="policy"),
    )


TOO_SMALL = r"search\.episodes_per_update is 1.*\n.*Set search\.episodes_per_update to"


def variant(**tables: Any) -> dict[str, Any]:
    """A bench of ``random`` and of a variant of it."""
    return {"agents": ["random", "other"], "variants": {"other": {"agent": {"name": "random"}, **tables}}}


def test_results_that_could_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*file/results/random-seed0\.json: Not a directory"):
        bench([bench_file(tmp_path, results="file/results")], progress=Console(quiet=True))


@pytest.mark.parametrize(("loss", "is_another"), [(3.0008, False), (3.02, True)])
def test_a_result_of_another_model_or_text(tmp_path: Path, loss: float, is_another: bool) -> None:
    file = bench_file(tmp_path, seeds=[0, 1, 2])
    for cell, dense in zip(read_bench(file).cells, (3.0, loss, 3.0), strict=True):
        write_result(cell.path, a_result(cell).model_copy(update={"seed": cell.seed, "dense_loss": dense}))
    if not is_another:
        bench([file], progress=Console(quiet=True), only_report=True)
        return
    with pytest.raises(ConfigError, match=r"random-seed1\.json has dense_loss = 3\.0200, .* another model") as raised:
        bench([file], progress=Console(quiet=True), only_report=True)
    assert "Delete it" in str(raised.value.hint)


def test_a_missing_file_is_called_a_bench_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bench file '.*nowhere\.toml' cannot be read"):
        read_bench(tmp_path / "nowhere.toml")


def test_a_variant_with_the_name_of_an_agent_that_another_would_search(tmp_path: Path) -> None:
    few = {"search": {"episodes": 12}}
    hint = refused(tmp_path, "'random' has the name of an agent.*who searches", variants={"random": few})
    assert 'Set agent.name = "random"' in str(hint)
    refused(tmp_path, "'flap' has the name of", agents=["flap"], variants={"flap": {"criterion": {"name": "flap"}}})
    said = {**few, "agent": {"name": "random"}}
    (cell,) = read_bench(bench_file(tmp_path, variants={"random": said})).cells
    assert (cell.config.agent.name, cell.config.search.episodes) == ("random", 12)


def test_texts_to_prepare_and_search_with_may_differ_and_how_long_they_are(tmp_path: Path) -> None:
    texts = {"calibration": "mine.txt", "search": [str(glass_home() / "c4.txt"), "3*mine.txt"]}
    for data in (texts, {"calibration_tokens": 4096, "search_tokens": 8192}):
        bench([bench_file(tmp_path, **variant(data=data))], only_report=True)


def test_of_the_reports_own_corpus_all_cells_read_as_much(tmp_path: Path) -> None:
    """The report's windows follow what they read of it."""
    both = {"data": {**glass_tables(tmp_path)["data"], "report": str(glass_home() / "c4.txt")}}
    refused(
        tmp_path,
        r"data\.calibration_tokens is \d+ for random and 4096 for other",
        tables=both,
        **variant(data={"calibration_tokens": 4096}),
    )


def test_slopes_count_in_the_tokens_of_an_update(tmp_path: Path) -> None:
    """An episode with slopes costs what 4 others do: 16 episodes' tokens are 4 of those, or 2 updates of 8."""
    tables = {"search": {"episodes": 16, "episodes_per_update": 8}}
    bench([bench_file(tmp_path, tables=tables, agents=["pathwise", "random"])], only_report=True)
    tables["search"]["episodes"] = 17
    refused(tmp_path, r"whole updates.* is \d+ for pathwise", tables=tables, agents=["pathwise", "random"])


def test_episodes_of_a_part_of_a_window_cost_the_whole(tmp_path: Path) -> None:
    tokens = glass_tables(tmp_path)["search"]["episode_tokens"]
    bench([bench_file(tmp_path, **variant(search={"episode_tokens": tokens - 1}))], only_report=True)


def test_a_variants_plugin_takes_no_options_of_the_one_it_replaces(tmp_path: Path) -> None:
    file = bench_file(
        tmp_path,
        tables={"agent": {"name": "reinforce", "learning_rate": 1.0}, "prior": {"name": "mlp-first", "spare_first": 2}},
        agents=["reinforce", "ppo", "owl-prior"],
        variants={"owl-prior": {"agent": {"name": "reinforce", "smooth": 0.5}, "prior": {"name": "owl"}}},
    )
    plain, ppo, owl = (cell.config for cell in read_bench(file).cells)
    assert (plain.agent.options["learning_rate"], plain.prior.options["spare_first"]) == (1.0, 2)
    assert ppo.agent.options["learning_rate"] == 0.003
    assert (owl.agent.options["learning_rate"], owl.agent.options["smooth"]) == (1.0, 0.5)
    assert owl.prior.options == {}


def test_an_option_that_has_another_value_now_outdates_results(tmp_path: Path) -> None:
    path = bench_file(tmp_path, agents=["reinforce"])
    (cell,) = read_bench(path).cells
    result = a_result(cell)
    result.settings["agent"]["smooth"] = 0.1  # an earlier default
    write_result(cell.path, result)
    refused(tmp_path, r"another configuration: agent\.smooth was 0\.1 and is 0\.95 now", agents=["reinforce"])


def test_an_option_that_a_plugin_has_learnt_since_outdates_no_results(tmp_path: Path) -> None:
    path = bench_file(tmp_path, agents=["reinforce"])
    (cell,) = read_bench(path).cells
    result = a_result(cell)
    del result.settings["agent"]["smooth"]
    write_result(cell.path, result)
    assert bench([path], progress=Console(quiet=True), only_report=True)


def test_the_file_of_a_run_is_named_as_such(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[model]\nname = "demo"\n')
    with pytest.raises(ConfigError, match="configures one run") as caught:
        read_bench(file)
    assert f"ffgym run --config {file}" in (caught.value.hint or "")
    file.write_text('agent = ["random"]\nseeds = [0]\n')  # a bench, with a mistyped key
    with pytest.raises(ConfigError, match="unknown table or key 'agent'") as caught:
        read_bench(file)
    assert "Did you mean 'agents'?" in (caught.value.hint or "")
    file.write_text("")
    with pytest.raises(ConfigError, match="needs a value for 'agents'") as caught:
        read_bench(file)
    assert caught.value.hint == "docs/bench.md shows one."


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"agents": []}, r"agents = \[\]: needs at least one entry"),
        ({"agents": ["random", "random"]}, "agents = .* twice"),
        (
            {"agents": ["random", "no-slopes", "no-slope"], "variants": {"no-slopes": {}}},
            r"small\.toml: unknown agent, heuristic or variant 'no-slope'\n.*Did you mean 'no-slopes'",
        ),
        ({"seeds": [1, 1]}, "seeds = .* twice"),
        ({"seeds": ["a"]}, "seeds = 'a': should be a valid integer"),
        (variant(seed=3), "sets `seed`.*\n.*Use `seeds`"),
        ({"sedes": [1]}, r"small\.toml: unknown .* 'sedes'"),
        ({"tables": {"prune": {"sparsty": 0.2}}}, r"'sparsty' in \[prune\]"),
        ({"baseline": "random-"}, r"small\.toml: unknown baseline 'random-'\n.*Did you mean 'random'\?"),
        (
            {"agents": ["few"], "variants": {"few": {"agent": {"name": "reinforce"}, "search": {"episodes": 3}}}},
            r"search\.episodes = 3 is less than an update of agent",
        ),
        *(
            ({"agents": ["random", agent], "tables": {"search": {"episodes_per_update": 1}}}, TOO_SMALL)
            for agent in ("ppo", "evopress")
        ),
        (
            {"agents": ["random", "uniform"], "more_seeds": {"random": [1], "uniform": [3]}},
            "more_seeds has 'uniform', a heuristic.*\n.*Leave it out of more_seeds",
        ),
        (
            {"tables": {"prune": {"resource": "latency", "context": 64}}},
            "random names none.*\n.*ffgym latency MODEL --output FILE",
        ),
        # variants
        (
            {"variants": {"rnadom": {"agent": {"name": "random"}}}},
            "'rnadom', which agents.*\n.*agents: random",
        ),
        *(
            ({"agents": [label], "variants": {label: {"agent": {"name": "random"}}}}, "cannot name a file")
            for label in ("a/b", "../other", "/other")
        ),
        ({"agents": ["other"], "variants": {"other": {"agent": "random"}}}, "agent = 'random': should be a table"),
        (variant(prune=3), "prune = 3: should be a table"),
        (variant(agent={"name": "reinforce", "lr": 1.0}), r"small\.toml, other: unknown key 'lr'"),
        (variant(search={"init_from": "nowhere"}), r"search\.init_from = 'nowhere'"),
        (variant(model={"revision": "v1"}), "on one model, these name .*model, .*model at v1"),
        (variant(recover={"method": "lora"}), "recover.method = 'lora'.*\n.*ffgym recover"),
        # unequal terms
        (variant(data={"report_tokens": 512}), r"data\.report_tokens is 1024 for random and 512 for other"),
        (variant(search={"episodes": 16}), "1024 for random and 2048 for other"),
        (variant(search={"episode_tokens": 64}), "1024 for random and 512 for other"),
        (variant(search={"episodes": 9}), "whole updates.* is 1024 for random and 1536 for other"),
        (variant(search={"finalists": 9}), r"search\.finalists is \d+ for random and 9 for other"),
        (variant(search={"final_tokens": 640}), r"search\.final_tokens is 512 for random and 640 for other"),
        (
            variant(data={"search": [str(glass_home() / "c4.txt"), str(glass_home() / "wiki.txt")]}),
            r"data\.search is 'no text of data.report' for random and \[.*\] for other",
        ),
        (
            variant(prune={"latency_table": "t.json"}),
            r"prune\.latency_table is None for random and 't\.json' for other",
        ),
        (variant(prune={"resource": "kv"}), r"prune\.resource is 'params' for random and 'kv' for other"),
    ],
)
def test_what_is_wrong_with_a_bench_file_is_said(tmp_path: Path, spec: dict[str, Any], said: str) -> None:
    refused(tmp_path, said, **spec)


def test_a_result_without_the_loss_that_is_asked_for_now(tmp_path: Path) -> None:
    path = bench_file(tmp_path)
    (cell,) = read_bench(path).cells
    write_result(cell.path, a_result(cell))
    bench([path], progress=Console(quiet=True))
    refused(
        tmp_path,
        "another configuration: the bench asks for plain = true, and this result was computed with plain = false",
        plain=True,
    )
    bench([bench_file(tmp_path, marks=2)], progress=Console(quiet=True), only_report=True)
    refused(
        tmp_path, "another configuration: the bench asks for marks = 7, and this result was computed with 6", marks=7
    )


def test_another_policy_in_the_same_place(tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    run = {"search": {"init_from": str(policy)}}
    state = {"weights": [[0.0], [0.0]], "log_spread": 0.0}
    policy.write_text(json.dumps({"agent": "reinforce", "state": state, "sublayers": ["layer 0 attention"]}))
    path = bench_file(tmp_path, agents=["reinforce"], tables=run)
    (cell,) = read_bench(path).cells
    stored = a_result(cell).model_copy(update={"policy": policy_digest(cell.config)})
    write_result(cell.path, stored)
    check_benches([read_bench(path)])
    policy.write_text(policy.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"search\.init_from = '.*policy\.json' holds another policy now"):
        check_benches([read_bench(path)])
    policy.unlink()
    check_benches([read_bench(path)])  # what was measured stays valid


def test_other_times_in_the_same_place(tmp_path: Path) -> None:
    model = load(str(glass_home() / "glass"), dtype="float32").model
    times = made_up_table(model, context=64)
    table = tmp_path / "times.json"
    table.write_text(to_json(times))
    run = {"prune": {"resource": "latency", "context": 64, "latency_table": str(table)}}
    (cell,) = read_bench(bench_file(tmp_path, tables=run)).cells
    write_result(cell.path, a_result(cell).model_copy(update={"latency": table_digest(cell.config)}))
    bench([bench_file(tmp_path, tables=run)], progress=Console(quiet=True), only_report=True)
    table.write_text(to_json(times.model_copy(update={"repetitions": 2})))
    refused(tmp_path, f"prune.latency_table = '{table}' holds other times now", tables=run)


def test_a_result_of_another_edition(tmp_path: Path) -> None:
    path = bench_file(tmp_path)
    (cell,) = read_bench(path).cells
    write_result(cell.path, a_result(cell).model_copy(update={"editions": {"agent": 2}}))
    refused(tmp_path, r"another configuration: the plugin named in \[agent\] has changed .* \(edition 2 then, 1 now\)")
