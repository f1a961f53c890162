"""What may be trained on shares nothing with the search and the report split, by place and by content."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from ffgym.config.tables import DataTable
from ffgym.data.repeats import REPEATED_TOKENS, run_hashes
from ffgym.data.splits import Splits
from ffgym.errors import DataError
from ffgym.prepare.parts import splits_of
from ffgym.recover.text import TrainingText, training_text

WORDS = [f"w{i}" for i in range(120)]  # of the tokenizer
WINDOW = 64


@pytest.fixture
def tokenizer(word_tokenizer: Any) -> Any:
    return word_tokenizer


def text(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


def cut(tokenizer: Any, *, calibration: Any, search: Any, report: str, **changes: int) -> Splits:
    sizes = {"window": WINDOW, "calibration_tokens": 128, "search_tokens": 256, "report_tokens": 192, **changes}
    settings = DataTable(calibration=calibration, search=search, report=report, **sizes)
    return splits_of(settings, tokenizer, context_limit=128)


def train_on(tokenizer: Any, splits: Splits, spec: str | None, **options: int) -> TrainingText:
    wanted = {"window": WINDOW, "tokens": 10**6, "at_least": 1, **options}
    return training_text(spec, splits, tokenizer, **wanted)


def tokens_of(windows: torch.Tensor) -> set[tuple[int, ...]]:
    """Every run of 20 tokens."""
    flat = windows.flatten().tolist()
    return {tuple(flat[i : i + 20]) for i in range(len(flat) - 19)}


@pytest.fixture
def c4(tmp_path: Path) -> str:
    return write(tmp_path / "c4.txt", text(1000, 0))


@pytest.fixture
def wiki(tmp_path: Path) -> str:
    return write(tmp_path / "wiki.txt", text(1000, 1))


@pytest.fixture
def splits(tokenizer: Any, c4: str, wiki: str) -> Splits:
    """Calibration and search on one text, the report on another."""
    return cut(tokenizer, calibration=c4, search=c4, report=wiki)


def test_the_default_is_the_calibration_corpus_without_search_windows(tokenizer: Any, splits: Splits, c4: str) -> None:
    found = train_on(tokenizer, splits, None)
    # 1,000 tokens: 128 of the calibration split, which may be trained on, 256 of the search split, then 616 free ones.
    assert found.windows.shape == (2 + 616 // WINDOW, WINDOW)
    assert torch.equal(found.windows[:2], splits.calibration.windows)
    for split in (splits.search, splits.report):
        assert not tokens_of(found.windows) & tokens_of(split.windows)
    assert found.left_out == 0
    assert train_on(tokenizer, splits, c4).digest == found.digest


@pytest.mark.parametrize("window", [WINDOW, 50])
def test_where_all_splits_are_one_text_its_rest_is_used(tokenizer: Any, c4: str, window: int) -> None:
    splits = cut(tokenizer, calibration=c4, search=c4, report=c4)
    found = train_on(tokenizer, splits, None, window=window)
    assert found.windows.shape == (128 // window + (1000 - 128 - 256 - 192) // window, window)
    for split in (splits.search, splits.report):
        assert not tokens_of(found.windows) & tokens_of(split.windows)


def test_the_report_text_itself_gives_its_other_windows(tokenizer: Any, splits: Splits, wiki: str) -> None:
    found = train_on(tokenizer, splits, wiki)
    assert len(found.windows) == (1000 - 192) // WINDOW
    assert not tokens_of(found.windows) & tokens_of(splits.report.windows)


def test_where_every_window_begins_with_bos_those_of_training_do_too(tokenizer: Any, c4: str, wiki: str) -> None:
    adding = copy.deepcopy(tokenizer)
    adding.bos_token = "<bos>"
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", adding.bos_token_id)]
    )
    splits = cut(adding, calibration=c4, search=c4, report=wiki)
    found = train_on(adding, splits, None)
    free = 1000 - (128 // WINDOW + 256 // WINDOW) * (WINDOW - 1)
    assert found.windows.shape == (2 + free // (WINDOW - 1), WINDOW)
    assert torch.equal(found.windows[:2], splits.calibration.windows)
    assert (found.windows[:, 0] == adding.bos_token_id).all()
    assert (found.windows[:, 1:] != adding.bos_token_id).all()
    for split in (splits.search, splits.report):
        assert not tokens_of(found.windows[:, 1:]) & tokens_of(split.windows[:, 1:])


def test_a_mixture_is_trained_on_in_its_shares(tmp_path: Path, tokenizer: Any, c4: str, wiki: str) -> None:
    code = write(tmp_path / "code.txt", text(3000, 2))
    splits = cut(tokenizer, calibration=[c4, f"3*{code}"], search=[c4, code], report=wiki, calibration_tokens=256)
    found = train_on(tokenizer, splits, None, tokens=16 * WINDOW)
    assert (found.name, found.source) == (splits.calibration.text, f"25% {c4} + 75% {code}")
    for corpus, windows in ((c4, 4), (code, 12)):
        own = tokens_of(train_on(tokenizer, splits, corpus).windows)
        assert sum(bool(tokens_of(window) & own) for window in found.windows) == windows
    for split in (splits.search, splits.report):
        assert not tokens_of(found.windows) & tokens_of(split.windows)


def test_only_as_much_as_asked_for(tokenizer: Any, splits: Splits) -> None:
    assert len(train_on(tokenizer, splits, None, tokens=130).windows) == 3


def test_windows_that_repeat_the_search_split_make_room_for_later_ones(
    tmp_path: Path, tokenizer: Any, c4: str, wiki: str
) -> None:
    """A larger dump of the text that was searched on: its beginning is the search split."""
    splits = cut(tokenizer, calibration=wiki, search=c4, report=write(tmp_path / "report.txt", text(1000, 2)))
    dump = write(tmp_path / "dump.txt", text(1000, 0) + " " + text(2000, 3))
    found = train_on(tokenizer, splits, dump, tokens=640, at_least=640)
    assert found.windows.shape == (10, WINDOW)
    assert found.left_out == 4
    assert not tokens_of(found.windows) & tokens_of(splits.search.windows)


def test_another_text_that_holds_report_text_is_refused(tmp_path: Path, tokenizer: Any, splits: Splits) -> None:
    stolen = " ".join(text(1000, 1).split()[100 : 100 + REPEATED_TOKENS])
    mine = write(tmp_path / "mine.txt", f"{text(333, 2)} {stolen} {text(400, 3)}")
    with pytest.raises(DataError, match=r"mine\.txt' holds text of the report split .*1 of its windows") as raised:
        # Of two windows that share the run, only one can hold all of it; the run is cut where a window ends.
        train_on(tokenizer, splits, mine, window=128)
    assert "data.report" in str(raised.value.hint)


def test_a_shorter_quotation_is_no_overlap(tmp_path: Path, tokenizer: Any, splits: Splits) -> None:
    quoted = " ".join(text(1000, 1).split()[100 : 100 + REPEATED_TOKENS - 1])
    mine = write(tmp_path / "mine.txt", f"{quoted} {text(400, 3)}")
    assert len(train_on(tokenizer, splits, mine).windows) == (400 + REPEATED_TOKENS - 1) // WINDOW


def test_too_short_names_the_tokens_needed(tmp_path: Path, tokenizer: Any, splits: Splits) -> None:
    short = write(tmp_path / "short.txt", text(200, 5))
    with pytest.raises(DataError, match=r"has 192 tokens to train on .* one step needs 256") as raised:
        train_on(tokenizer, splits, short, at_least=256)
    assert "--corpus" in str(raised.value.hint)


def test_a_corpus_that_is_not_there_is_named(tokenizer: Any, splits: Splits) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        train_on(tokenizer, splits, "nowhere.txt")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 12))
def test_equal_hashes_are_equal_runs(ids: list[int], run: int) -> None:
    hashes = run_hashes(np.array([ids]), run)[0]
    runs = [tuple(ids[i : i + run]) for i in range(len(ids) - run + 1)]
    assert len(hashes) == len(runs)
    for i, one in enumerate(runs):
        for j, other in enumerate(runs):
            assert (hashes[i] == hashes[j]) == (one == other)
