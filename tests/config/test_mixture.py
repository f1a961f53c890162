"""Mixtures of corpora: how they are written, stored, shown and refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from ffgym.config.mixture import described, shares
from ffgym.config.tables import RunConfig
from ffgym.config.toml import changed_settings, digest, load_config, settings, to_toml
from ffgym.errors import ConfigError
from ffgym.tracking.names import parameters

MIXED = ["3*demo:c4", "mine.txt"]


def mixed(value: Any) -> RunConfig:
    return load_config(data={"calibration": value})


@pytest.mark.parametrize(
    ("written", "expected", "shown"),
    [
        ("demo:c4", {"demo:c4": 1}, "demo:c4"),
        (["demo:c4"], {"demo:c4": 1}, "demo:c4"),
        (["demo:c4", "mine.txt"], {"demo:c4": "1/2", "mine.txt": "1/2"}, "50% demo:c4 + 50% mine.txt"),
        (MIXED, {"demo:c4": "3/4", "mine.txt": "1/4"}, "75% demo:c4 + 25% mine.txt"),
        (["0.1 * a", "0.2*b"], {"a": "1/3", "b": "2/3"}, "33.3% a + 66.7% b"),
        (["5.*a", ".5*b"], {"a": "10/11", "b": "1/11"}, "90.9% a + 9.09% b"),
        (["a", "5e-1*b c.txt", "1.5*c"], {"a": "1/3", "b c.txt": "1/6", "c": "1/2"}, "33.3% a + 16.7% b c.txt + 50% c"),
    ],
)
def test_equal_shares_or_weights(written: Any, expected: dict[str, Any], shown: str) -> None:
    corpora = mixed(written).data.calibration
    assert shares(corpora) == {name: Fraction(share) for name, share in expected.items()}
    assert described(corpora) == shown


def test_the_command_line_takes_a_list_of_toml(tmp_path: Path) -> None:
    assert load_config(None, ['data.calibration=["3*demo:c4", "mine.txt"]']) == mixed(MIXED)
    file = tmp_path / "run.toml"
    file.write_text('[data]\ncalibration = ["3*demo:c4", "mine.txt"]\n')
    assert load_config(file) == mixed(MIXED)
    assert load_config(file, ["data.calibration=demo:c4"]) == RunConfig()


def test_a_mixture_is_written_down_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(to_toml(mixed(MIXED)))
    assert load_config(file) == mixed(MIXED)


def test_names_and_weights_are_part_of_what_decides_a_run() -> None:
    configs = [mixed(value) for value in ("demo:c4", MIXED, ["demo:c4", "mine.txt"], ["3*demo:c4", "other.txt"])]
    assert len({digest(config) for config in configs}) == 4
    assert len({parameters(config.model_dump(mode="json"))["toml.data.calibration"] for config in configs}) == 4
    changes = changed_settings(settings(configs[0]), configs[1])
    assert changes == ['data.calibration was "demo:c4" and is ["3*demo:c4", "mine.txt"] now']


def test_a_single_corpus_is_stored_as_before() -> None:
    assert settings(RunConfig())["data"]["calibration"] == "demo:c4"
    assert 'calibration = "demo:c4"' in to_toml(mixed(["demo:c4"]))


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("[]", "data.calibration = []: should name a corpus"),
        ('""', "should name a corpus"),
        ('["demo:c4", ""]', "should name a corpus"),
        ('["demo:c4", "0*mine.txt"]', "gives 'mine.txt' the weight 0, which should be greater than 0"),
        ('["demo:c4", "-1.5 * mine.txt"]', "gives 'mine.txt' the weight -1.5, which should be greater than 0"),
        ('["demo:c4", "mine.txt", "2*demo:c4"]', "names 'demo:c4' twice; a weight gives it more, e.g. '2*demo:c4'"),
        ('["demo:c4", 3]', "should be the name of a corpus or a list of names, each with or without a weight"),
        ('{"demo:c4" = 3}', "should be the name of a corpus or a list of names, each with or without a weight"),
        ("[demo:c4,mine.txt]", "is no list in TOML; quote the names and the whole, e.g. --set 'data.search=["),
        ('["40*demo:c4", "mine.txt"]', "gives 'mine.txt' 2.44% of 32 windows, less than one"),
    ],
)
def test_what_is_no_mixture_is_refused_by_name(written: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(None, [f"data.calibration={written}"])
    assert "data.calibration" in raised.value.message
    assert complaint in raised.value.message
    assert raised.value.hint
