"""A checkpoint comes back bit by bit, belongs to one training, and is never half there."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from ffgym.errors import OutputError, RecoveryError
from ffgym.recover.checkpoint import Checkpoint, random_state, set_random_state

TENSORS = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1.5], dtype=torch.bfloat16), "r": torch.ones(0)}


def claimed(folder: Path, *, overwrite: bool = False, **identity: object) -> Checkpoint:
    checkpoint = Checkpoint(folder, {"rank": 8, "seed": 0, **identity})
    checkpoint.claim(overwrite=overwrite)
    return checkpoint


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoint = claimed(tmp_path / "c")
    assert (checkpoint.exists, checkpoint.load("lora", dict[str, Any])) == (False, None)
    checkpoint.save("lora", TENSORS, {"step": 3, "losses": [0.1, 0.2]})
    again = claimed(tmp_path / "c")
    part = again.load("lora", dict[str, Any])
    assert again.exists
    assert part is not None
    tensors, facts = part
    assert facts == {"step": 3, "losses": [0.1, 0.2]}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    again.remove()
    assert not (tmp_path / "c").exists()


def test_overwriting_keeps_what_belongs_to_this_training(tmp_path: Path) -> None:
    claimed(tmp_path / "c").save("lora", TENSORS, {})
    assert claimed(tmp_path / "c", overwrite=True).exists


def test_a_training_that_wrote_no_part_is_in_nobodys_way(tmp_path: Path) -> None:
    claimed(tmp_path / "c")
    assert not claimed(tmp_path / "c", rank=16).exists


@pytest.mark.parametrize("facts", [{}, "dict", None, ["step"]])
def test_facts_that_are_no_type_are_refused_before_there_is_a_part(tmp_path: Path, facts: Any) -> None:
    with pytest.raises(RecoveryError, match=r"part 'lora': facts is .*, not a type such as dict"):
        claimed(tmp_path / "c").load("lora", facts)


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecoveryError, match=r"part 'lora': tensors\['losses'\] is a list, not a tensor"):
        claimed(tmp_path / "c").save("lora", {**TENSORS, "losses": [1, 2]}, {})  # type: ignore[dict-item]
    assert not list((tmp_path / "c").glob("*.safetensors"))


def full_disk(self: Path, *_: object, **__: object) -> None:
    self.open("w").close()
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_a_training_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed(tmp_path / "c").save("lora", TENSORS, {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        assert claimed(tmp_path / "c").exists, "nothing has to be written"
        with pytest.raises(OutputError):
            claimed(tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())
    assert not claimed(tmp_path / "other").exists, "the empty folder is in nobody's way"
    assert claimed(tmp_path / "c").exists


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="in the way"):
        claimed(tmp_path / "c", overwrite=True)
    assert (tmp_path / "c" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\x80\x04\x95"])
def test_a_damaged_part_is_said_to_be(tmp_path: Path, content: bytes) -> None:
    claimed(tmp_path / "c").save("lora", TENSORS, {})
    (tmp_path / "c" / "lora.safetensors").write_bytes(content)
    with pytest.raises(RecoveryError, match="damaged") as raised:
        claimed(tmp_path / "c", overwrite=True).load("lora", dict[str, Any])
    assert raised.value.hint == "Delete the folder that it lies in, and start anew.", "--overwrite keeps the parts"


def test_every_gpu_has_a_random_state_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that are made up."""
    devices = {torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)}
    states = {device: torch.tensor([device.index]) for device in devices if device.type == "cuda"}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    before = random_state(devices)
    states.update(dict.fromkeys(states, torch.tensor([7])))
    set_random_state(before, devices)
    assert {device.index: int(state) for device, state in states.items()} == {0: 0, 1: 1}
