"""RunConfig: defaults, sources and their order, TOML out and in, and an error for everything that cannot run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from ffgym.config.tables import RunConfig
from ffgym.config.toml import changed_settings, digest, load_config, settings, to_toml
from ffgym.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_source_gives_the_defaults() -> None:
    config = load_config()
    assert config == RunConfig()
    assert (config.prune.sparsity, config.agent.name, config.criterion.name) == (0.2, "reinforce", "wanda")
    assert config.output.dir is None


def test_command_line_options_win_over_overrides_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 1\n[prune]\nsparsity = 0.3\nmin_units = 2\n[search]\nepisodes = 40\n")
    config = load_config(path, ["prune.sparsity=0.4", "search.episodes=48"], seed=None, prune={"sparsity": 0.5})
    assert config.seed == 1
    assert config.prune.sparsity == 0.5
    assert config.prune.min_units == 2
    assert config.search.episodes == 48
    assert load_config(path, "prune.sparsity=0.4").prune.sparsity == 0.4


def test_overrides_are_toml_literals_or_else_strings() -> None:
    config = load_config(
        None,
        ["data.search=demo:c4", "prune.ridge=0.01", "output.save_model=false", 'model.name="1e3"', "agent.a.b=[1, 2]"],
    )
    assert config.data.search == "demo:c4"
    assert config.prune.ridge == 0.01
    assert config.output.save_model is False
    assert config.model.name == "1e3"
    assert config.agent.options == {"a": {"b": [1, 2]}}
    assert load_config(None, ["model.revision=a=b"]).model.revision == "a=b"
    assert load_config(None, ["seed=7"]).seed == 7


def test_naming_another_plugin_drops_the_options_of_the_files(tmp_path: Path) -> None:
    path = write(tmp_path, '[criterion]\nname = "acme"\npower = 2\n[prior]\nspare_first = 2\n')
    assert load_config(path).criterion.options == {"power": 2}
    assert load_config(path, criterion={"name": "acme"}).criterion.options == {"power": 2}
    other = load_config(path, ["criterion.seed=3"], criterion={"name": "random"})
    assert (other.criterion.name, other.criterion.options) == ("random", {"seed": 3})
    assert load_config(path, prior={"name": "mlp-first"}).prior.options == {"spare_first": 2}
    assert load_config(path, prior={"name": "uniform"}).prior.options == {}


def test_toml_round_trips(tmp_path: Path) -> None:
    config = load_config(
        None,
        ["prune.ridge=0.5", "output.dir=out", "agent.lr=1e-3", "agent.net.sizes=[8, 8]", 'criterion.note="a # b"'],
        seed=3,
    )
    for each in (RunConfig(), config):
        assert load_config(write(tmp_path, to_toml(each))) == each


def test_toml_round_trips_what_looks_like_a_new_line(tmp_path: Path) -> None:
    config = load_config(data={"report": "a\u2028b\x85c.txt"}, criterion={"name": "mine", "rate": 0.5})
    path = tmp_path / "run.toml"
    path.write_text(
        to_toml(config, {"criterion": {"rate": "How fast.\n\n    Larger \x1bis faster."}}), encoding="utf-8"
    )
    assert load_config(path) == config
    assert "rate = 0.5  # How fast. Larger is faster.\n" in path.read_text(encoding="utf-8")


def test_printed_toml_has_every_key_with_a_comment() -> None:
    text = to_toml(RunConfig())
    plain = tomllib.loads(text)
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert plain[name].keys() == field.annotation.model_fields.keys()
    assert all("  # " in line for line in text.splitlines() if line)


def test_empty_string_unsets_an_optional_key(tmp_path: Path) -> None:
    path = write(tmp_path, '[search]\ninit_from = "runs/a"\n')
    assert load_config(path).search.init_from == "runs/a"
    assert load_config(path, ['search.init_from=""']).search.init_from is None


def test_digest_follows_what_decides_the_numbers() -> None:
    base = digest(RunConfig())
    assert base == digest(load_config(output={"dir": "elsewhere"}, tracking={"experiment": "other"}))
    assert base == digest(load_config(recover={"method": "lora", "rank": 4}))
    assert base == digest(load_config(workers={"count": 2}))
    assert base != digest(load_config(seed=1))
    assert base != digest(load_config(agent={"lr": 0.1}))


def test_stored_settings_are_compared_key_by_key() -> None:
    config = load_config(seed=1, agent={"lr": 0.1}, output={"dir": "elsewhere"})
    stored = json.loads(json.dumps(settings(config)))
    assert changed_settings(stored, config) == []
    assert changed_settings(stored, load_config()) == ["agent.lr was 0.1 and is unset now", "seed was 1 and is 0 now"]
    assert changed_settings(stored, load_config(seed=1, agent={"lr": 0.1}, search={"init_from": "runs/a"})) == [
        'search.init_from was unset and is "runs/a" now'
    ]


def test_settings_stored_before_a_key_existed_count_as_its_default() -> None:
    stored = settings(RunConfig())
    del stored["schedule"], stored["search"]["episodes"], stored["criterion"]
    assert changed_settings(stored, RunConfig()) == []
    assert changed_settings(stored, load_config(search={"episodes": 104})) == ["search.episodes was 48 and is 104 now"]


def test_settings_that_this_version_cannot_read_say_so() -> None:
    unknown = {**settings(RunConfig()), "magic": {}}
    assert changed_settings(unknown, RunConfig()) == ["unknown table or key 'magic' in the configuration"]
    impossible = {**settings(RunConfig()), "search": {"final_tokens": 3}}
    assert "less than one window" in changed_settings(impossible, RunConfig())[0]


def test_a_stock_checkpoint_has_no_empty_sublayers() -> None:
    with pytest.raises(ConfigError, match=r"prune\.uniform = true with prune\.min_units = 0") as caught:
        load_config(prune={"uniform": True, "min_units": 0})
    assert "prune.min_units to 1" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "complaints"),
    [
        ("prune.sparcity=0.3", ["unknown key 'sparcity' in [prune]", "Did you mean 'sparsity'?", "ridge, min_units"]),
        ("prunne.sparsity=0.3", ["unknown table or key 'prunne'", "Did you mean 'prune'?", "criterion, reward"]),
        ("search.search_tokens=9", ["unknown key 'search_tokens' in [search]", "Did you mean 'data.search_tokens'?"]),
        ("prune.sparsity=0", ["prune.sparsity = 0", "greater than 0", "between 0 and 1"]),
        ("prune.sparsity=nan", ["prune.sparsity = nan", "finite"]),
        ("prune.sparsity=a lot", ["prune.sparsity = 'a lot'", "valid number"]),
        ("prune.ridge=high", ["prune.ridge = 'high'", "should be 'auto' or a valid number"]),
        ("prune.align=0", ["prune.align = 0", "should be 'auto' or greater than or equal to 1"]),
        ("search.episodes=many", ["search.episodes = 'many'", "valid integer"]),
        ("output.overwrite=1", ["output.overwrite = 1", "valid boolean"]),
        ("model.device=gpu", ["model.device = 'gpu': has none of the allowed forms", "cuda:1"]),
        ('model.name=""', ["model.name = ''", "at least 1 character"]),
        ("criterion.name=3", ["criterion.name = 3", "valid string", "ffgym ls criteria"]),
        ("criterion=3", ["criterion = 3", "should be a table", "[criterion]"]),
        ("data.window=4096", ["search.episode_tokens = 2048 is less than one window: data.window = 4096"]),
        ("data.calibration_tokens=100", ["data.calibration_tokens = 100 is less than one window"]),
        ("data.report_tokens=100", ["data.report_tokens = 100 is less than one window"]),
        ("search.final_tokens=100", ["search.final_tokens = 100 is less than one window"]),
        (
            "data.search_tokens=1024",
            ["data.search_tokens = 1024 is less than search.episode_tokens + search.final_tokens = 18432"],
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name(override: str, complaints: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    for complaint in complaints:
        assert complaint in str(caught.value)


def test_sparsity_ramp_must_start_below_its_target() -> None:
    assert load_config(prune={"sparsity": 0.04}).schedule.sparsity == "none"
    with pytest.raises(ConfigError, match=r"prune\.sparsity = 0\.04 is less than schedule\.sparsity_start = 0\.05"):
        load_config(prune={"sparsity": 0.04}, schedule={"sparsity": "cubic"})


def test_episodes_are_rounded_up_to_whole_windows_and_the_finals_down() -> None:
    config = load_config(None, ["data.window=512", "search.episode_tokens=1100", "search.final_tokens=1100"])
    assert (config.episode_windows, config.final_windows) == (3, 2)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["prune.sparsity=2", "search.episods=3"])
    assert "prune.sparsity = 2" in caught.value.message
    assert "unknown key 'episods' in [search]" in caught.value.message


@pytest.mark.parametrize("override", ["sparsity", "=3", "prune.=3", ".sparsity=3", ""])
def test_malformed_override_says_how_to_write_it(override: str) -> None:
    with pytest.raises(ConfigError, match="Write --set KEY=VALUE"):
        load_config(None, [override])


def test_what_is_no_toml_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"configuration .*nowhere\.toml' cannot be read: No such file"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"configuration .* is a folder"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.toml is no configuration, or a damaged one: not valid TOML: .*line 2"):
        load_config(write(tmp_path, "[prune]\nsparsity = = 3\n"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(binary)
    binary.rename(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"its name does not end in \.toml"):
        load_config(tmp_path / "run.yaml")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "\ufeffseed = 3\n")).seed == 3


# a range of budgets


@pytest.mark.parametrize(
    ("text", "canonical", "ends"),
    [("0.1:0.5", "0.1:0.5", (0.1, 0.5)), (".10 : .50", "0.1:0.5", (0.1, 0.5)), ("1e-1:0.25", "0.1:0.25", (0.1, 0.25))],
)
def test_a_range_of_budgets_is_read_and_written_in_one_way(
    tmp_path: Path, text: str, canonical: str, ends: tuple[float, float]
) -> None:
    for config in (load_config(prune={"sparsity": text}), load_config(None, [f"prune.sparsity={text}"])):
        assert config.prune.sparsity == canonical
        assert config.prune.ends == ends
        assert config.prune.is_range
        assert config.prune.target == pytest.approx(sum(ends) / 2)
        assert load_config(write(tmp_path, to_toml(config))) == config


def test_a_single_target_is_its_own_range() -> None:
    prune = load_config(prune={"sparsity": 0.3}).prune
    assert (prune.ends, prune.target, prune.is_range) == ((0.3, 0.3), 0.3, False)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0.5:0.1", "should rise: write '0.1:0.5'"),
        ("0.2:0.2", "should have two different ends; a single target is written 0.2"),
        ("0.1:0.1000004", "should have two different ends; a single target is written 0.1"),
        ("-0.1:0.5", "should be greater than 0"),
        ("0.1:1.5", "should be less than 1"),
        ("0.1:nan", "should be a finite number"),
        (":0.5", "should be a valid number, or two for a range"),
        ("a:b", "should be a valid number, or two for a range"),
    ],
)
def test_a_range_that_is_none_is_refused_with_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(prune={"sparsity": text})
    assert f"prune.sparsity = {text!r}: {complaint}" in caught.value.message
    assert caught.value.hint


RANGE = {"sparsity": "0.1:0.5"}


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        ({"prune": RANGE, "schedule": {"sparsity": "cubic"}}, "schedule.sparsity = 'cubic' has none to rise to"),
        ({"prune": RANGE, "output": {"save_at": 0.6}}, "output.save_at = 0.6 is outside the range 0.1:0.5"),
        ({"prune": RANGE, "output": {"save_at": 0.2, "save_all": True}}, "output.save_all every point's"),
        ({"prune": {**RANGE, "front_points": 1}}, "prune.front_points = 1"),
        ({"prune": {**RANGE, "front_points": 100_000_000}}, "prune.front_points = 100000000"),
        ({"output": {"save_at": 0.2}}, "output.save_at chooses among the points of a range"),
        ({"output": {"save_all": True}}, "output.save_all chooses among the points of a range"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_with_a_range_is_refused(tables: dict[str, dict[str, object]], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(**tables)
    assert complaint in caught.value.message
    assert caught.value.hint


def test_a_target_to_save_takes_the_place_of_a_point_beside_it() -> None:
    """Files are named after targets."""
    third = 0.1 + 0.7 / 3
    config = load_config(prune={"sparsity": "0.1:0.8", "front_points": 4}, output={"save_at": third})
    assert config.targets == (0.1, third, 0.566667, 0.8)


@pytest.mark.parametrize("method", ["lora", "distil-mlp"])
def test_float16_is_not_trained_in(method: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype = 'float16'"):
        load_config(model={"dtype": "float16"}, recover={"method": method})


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("recover.tokens=many", "recover.tokens = 'many'"),
        ("recover.tokens=20kk", "recover.tokens = '20kk': should be a whole number, also as 500k or 1M"),
        ("recover.tokens=100", "recover.tokens = 100 is less than one step: recover.batch_tokens = 4096"),
        ("recover.batch_tokens=10", "recover.batch_tokens = 10 is less than one window: data.window = 1024"),
        ("output.save_model=false", "output.save_model = false saves none"),
    ],
)
def test_a_recovery_that_cannot_run_is_refused(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(None, ["recover.method=lora", override])
    assert complaint in str(raised.value)
    assert raised.value.hint


@pytest.mark.parametrize(("text", "tokens"), [("1M", 1_000_000), ("1.5k", 1500), ("300000", 300_000)])
def test_tokens_can_be_written_short(text: str, tokens: int) -> None:
    table = {"method": "lora", "tokens": text, "batch_tokens": "1k"}
    assert load_config(recover=table, data={"window": 512}).recover.tokens == tokens


@pytest.mark.parametrize(
    ("tables", "targets", "main"),
    [
        ({"prune": {"sparsity": 0.3}}, (0.3,), 0.3),
        ({"prune": RANGE}, (0.1, 0.2, 0.3, 0.4, 0.5), 0.3),
        ({"prune": {**RANGE, "front_points": 2}}, (0.1, 0.5), 0.5),
        ({"prune": {**RANGE, "front_points": 3}, "output": {"save_at": 0.2}}, (0.1, 0.2, 0.3, 0.5), 0.2),
        ({"prune": RANGE, "output": {"save_at": 0.5}}, (0.1, 0.2, 0.3, 0.4, 0.5), 0.5),
    ],
)
def test_the_points_of_the_front(tables: dict[str, dict[str, object]], targets: tuple[float, ...], main: float) -> None:
    config = load_config(**tables)
    assert (config.targets, config.main_target) == (targets, main)


def test_paths_and_numbers_of_numpy_are_values(tmp_path: Path) -> None:
    config = load_config(
        seed=np.int64(3),
        model={"name": tmp_path / "model"},
        search={"episodes": np.int64(16), "random_baseline": np.bool_(False), "init_from": tmp_path},
        prune={"sparsity": np.float32(0.25)},
        criterion={"name": "mine", "rate": np.float64(0.5)},
    )
    assert (config.model.name, config.search.init_from) == (str(tmp_path / "model"), str(tmp_path))
    assert (config.seed, config.search.episodes, config.search.random_baseline) == (3, 16, False)
    assert (config.prune.sparsity, config.criterion.options) == (0.25, {"rate": 0.5})
    assert load_config(write(tmp_path, to_toml(config))) == config, "plain data all of it"
    with pytest.raises(ConfigError, match=r"prune\.sparsity = \[0\.1, 0\.5\]"):
        load_config(prune={"sparsity": np.array([0.1, 0.5])})


def test_a_configuration_in_place_of_a_file_is_changed_as_one() -> None:
    tables = {"data": {"search": ["demo:c4", "2*demo:wiki"]}, "agent": {"name": "reinforce", "lr": 0.1}}
    config = load_config(**tables, prune={"sparsity": "0.1:0.5", "ridge": 0.1})
    assert load_config(config) == config
    assert load_config(config, seed=1, prune={"sparsity": 0.3}) == load_config(
        **tables, prune={"sparsity": 0.3, "ridge": 0.1}, seed=1
    )
    assert load_config(config, agent={"name": "random"}).agent.options == {}


def test_a_bench_file_is_refused_as_such(tmp_path: Path) -> None:
    path = write(tmp_path, 'title = "Mine"\nagents = ["reinforce"]\nseeds = [0]\nresults = "results"\n')
    with pytest.raises(ConfigError, match=r"run\.toml is a bench file: it names agents and seeds") as raised:
        load_config(path)
    assert raised.value.hint == f"Run it: ffgym bench {path}"


def test_a_dict_may_take_the_place_of_a_file() -> None:
    tables = {"prune": {"sparsity": 0.3, "ridge": None}, "agent": {"name": "cma-es", "smooth": 0.9}}
    assert load_config(tables, prune={"ridge": 0.1}) == load_config(
        **tables | {"prune": {"sparsity": 0.3, "ridge": 0.1}}
    )
    assert load_config(tables, agent={"name": "random"}).agent.options == {}
    with pytest.raises(ConfigError, match="unknown table or key 'pruned' in the configuration"):
        load_config({"pruned": {}})
