"""Losses of the dense model outlive a process: the next evaluator reads the bits that the first one measured."""

from __future__ import annotations

import json

import pytest
import torch

from ffgym.criteria.wanda import Wanda
from ffgym.evaluation.evaluator import ModelEvaluator, Request
from ffgym.evaluation.known import KnownLosses
from ffgym.prepare.paths import prepare
from ffgym.testing.models import tiny_model

WINDOWS = torch.randint(3, 128, (6, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prunable():
    calibration = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    return prepare(tiny_model("llama"), Wanda(), calibration, ridge=0.01).prunable


def dense_losses(prunable, windows, file, places):
    (found,) = ModelEvaluator(prunable, windows, known=file).measure([Request(prunable.dense_units, places)])
    return found.losses


def test_the_next_evaluator_reads_the_same_bits(prunable, tmp_path):
    file = tmp_path / "losses.jsonl"
    first = dense_losses(prunable, WINDOWS, file, (4, 0, 2))
    assert len(file.read_text().splitlines()) == 3
    assert KnownLosses(file).among(WINDOWS) == dict(zip((4, 0, 2), first, strict=True))
    assert dense_losses(prunable, WINDOWS, file, (0, 2, 4)) == tuple(first[place] for place in (1, 2, 0))
    assert len(file.read_text().splitlines()) == 3  # nothing was measured again


def test_windows_are_known_wherever_they_stand(prunable, tmp_path):
    file = tmp_path / "losses.jsonl"
    first = dense_losses(prunable, WINDOWS, file, (0, 1))
    file.write_text(file.read_text().replace(repr(first[0]), "1.5"))
    assert dense_losses(prunable, WINDOWS.flip(0), file, (5, 4)) == (1.5, first[1])  # it is read, not measured


def test_divergences_still_have_the_dense_model_run(prunable, tmp_path):
    file = tmp_path / "losses.jsonl"
    dense_losses(prunable, WINDOWS, file, (0, 1))
    kept = tuple(max(1, units // 2) for units in prunable.dense_units)
    request = Request(kept, (0, 1), needs=frozenset({"kl"}))
    (found,) = ModelEvaluator(prunable, WINDOWS, known=file).measure([request])
    (alone,) = ModelEvaluator(prunable, WINDOWS).measure([request])
    assert found == alone
    assert found.kl > 0
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("damage", ['["cut off', "[1, 2]", "not JSON", '["x", NaN]', "\0\0\0"])
def test_damaged_lines_count_as_not_there(prunable, tmp_path, damage):
    file = tmp_path / "losses.jsonl"
    first = dense_losses(prunable, WINDOWS, file, (0, 1))
    lines = file.read_text().splitlines()
    digest = json.loads(lines[0])[0]
    file.write_text("\n".join([damage.replace("x", digest), lines[1]]) + "\n")
    assert KnownLosses(file).among(WINDOWS) == {1: first[1]}
    assert dense_losses(prunable, WINDOWS, file, (0, 1)) == first
    assert KnownLosses(file).among(WINDOWS) == {0: first[0], 1: first[1]}


def test_a_place_that_cannot_be_written_keeps_nothing(prunable, tmp_path):
    alone = dense_losses(prunable, WINDOWS, None, (0, 1))
    assert dense_losses(prunable, WINDOWS, tmp_path / "missing" / "losses.jsonl", (0, 1)) == alone
    assert dense_losses(prunable, WINDOWS, tmp_path, (0, 1)) == alone  # a folder
