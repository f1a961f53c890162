"""Stock vLLM serves a model as it was saved: the same tokens, the same probabilities (``make test-vllm``)."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffgym.export.checkpoint import uneven_model
from ffgym.models.cut import PrunableModel
from ffgym.models.families import family_of
from ffgym.models.loading import load
from ffgym.testing.models import TINY_FAMILIES, tiny_model

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no environment with vLLM: make test-vllm makes one"),
]
NEW_TOKENS = 16
PROMPTS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1)).tolist()
KEPT = {
    "uneven": (4, 47, 3, 31, 2, 17, 1, 1),  # every number of KV groups, odd widths
    "biased": (4, 47, 3, 31, 2, 17, 1, 1),
    "no MLP": (4, 47, 3, 0, 2, 17, 1, 1),
    "no attention": (4, 47, 0, 31, 2, 17, 1, 1),
}
REFUSED = [("opt", "no MLP")]  # vLLM divides by the number of its channels and dies: docs/serving.md


def saved(family: str, kind: str, folder: Path) -> None:
    prunable = PrunableModel(tiny_model(family, grouped_query=False, layers=4, head_dim=32))
    kept = tuple(map(min, KEPT[kind], prunable.dense_units))  # OLMo's attention has one unit
    prunable.cut(kept)
    if kind == "biased":  # as affine calibration leaves them
        for half, units, dense in zip(prunable.halves, kept, prunable.dense_units, strict=True):
            if 0 < units < dense:
                half.set_consumer(half.consumer.weight, torch.linspace(-1, 1, len(half.consumer.weight)))
    uneven_model(prunable.model, kept=kept, family=family_of(prunable.model)).save_pretrained(folder)


def environment(work: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hub"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def asked_in_vllm(folders: list[Path], work: Path) -> dict[str, Any]:
    asked = work / "asked.json"
    asked.write_text(
        json.dumps({"models": list(map(str, folders)), "prompts": PROMPTS, "new_tokens": NEW_TOKENS}), encoding="utf-8"
    )
    command = [str(PYTHON), str(Path(__file__).with_name("vllm_answers.py")), str(asked)]
    done = subprocess.run(command, env=environment(work), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All models, and what vLLM said of them."""
    root = tmp_path_factory.mktemp("served")
    folders = []
    for family in TINY_FAMILIES:
        for kind in KEPT:
            if (family, kind) not in REFUSED:
                folders.append(root / f"{family}-{kind.replace(' ', '-')}")
                saved(family, kind, folders[-1])
    return root, asked_in_vllm(folders, root)


@pytest.mark.parametrize(
    ("family", "kind"), [pair for pair in itertools.product(TINY_FAMILIES, KEPT) if pair not in REFUSED]
)
def test_says_what_transformers_says(family: str, kind: str, served: tuple[Path, dict[str, Any]]) -> None:
    root, found = served
    folder = root / f"{family}-{kind.replace(' ', '-')}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None  # vLLM was told to ignore it
    ids = torch.tensor(PROMPTS)
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        logits = model(ids).logits[:, :-1].log_softmax(dim=-1)
    expected = logits.gather(2, ids[:, 1:, None])[:, :, 0]
    assert found[str(folder)]["tokens"] == made[:, ids.shape[1] :].tolist()
    assert torch.allclose(torch.tensor(found[str(folder)]["log_probabilities"]), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with narrower MLPs: the deepest one has lost a quarter of its channels."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    loaded = load("demo", dtype="float32")
    prunable = PrunableModel(loaded.model)
    deepest = len(prunable.halves) - 1
    kept = [
        units if half.sublayer.kind == "attention" else units - units * index // (4 * deepest)
        for index, (half, units) in enumerate(zip(prunable.halves, prunable.dense_units, strict=True))
    ]
    prunable.cut(kept)
    uneven_model(prunable.model, kept=kept, family=family_of(prunable.model)).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(demo: Path) -> Iterator[str]:
    """Address of a server that answers as OpenAI's does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo), "--trust-remote-code"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "pruned"]
    log = (demo.parent / "server.log").open("w")
    process = subprocess.Popen(command, env=environment(demo.parent), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, (demo.parent / "server.log").read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.demo
def test_the_server_answers_as_the_saved_model_does(demo: Path, server: str) -> None:
    prompt = "The capital of France is"
    body = {"model": "pruned", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        said = json.load(response)["choices"][0]["text"]
    tokenizer = AutoTokenizer.from_pretrained(demo)
    model = AutoModelForCausalLM.from_pretrained(demo)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert said == tokenizer.decode(made, skip_special_tokens=True)
