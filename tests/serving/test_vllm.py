"""Stock vLLM serves a model as it was saved: the same tokens, the same probabilities (``make test-vllm``)."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import answers, free_port, until
from transformers import AutoModelForCausalLM, AutoTokenizer

from ffgym.export.checkpoint import stock_model, uneven_model
from ffgym.models.cut import PrunableModel
from ffgym.models.loading import load
from ffgym.models.sublayer import parameter
from ffgym.testing.models import EXPERT_FAMILIES, TINY_FAMILIES, tiny_model

PYTHON = os.environ.get("FFGYM_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="FFGYM_VLLM_PYTHON names no Python with vLLM: make test-vllm makes one"),
]
NEW_TOKENS = 16
PROMPTS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1)).tolist()
KEPT = {  # every number of KV groups, odd widths; a norm behind an MLP of one channel would amplify rounding
    "uneven": (4, 47, 3, 31, 2, 17, 1, 5),
    "biased": (4, 47, 3, 31, 2, 17, 1, 5),
    "no MLP": (4, 47, 3, 0, 2, 17, 1, 5),
    "no attention": (4, 47, 0, 31, 2, 17, 1, 5),
}
KEPT_WITH_EXPERTS = {
    "uneven": (4, 6, 3, 4, 2, 3, 1, 2),
    "no attention": (4, 6, 0, 4, 2, 3, 1, 2),
    "stock": (4, 4) * 4,  # served by vLLM's own classes
}
MODELS = dict.fromkeys(TINY_FAMILIES, KEPT) | dict.fromkeys(EXPERT_FAMILIES, KEPT_WITH_EXPERTS)
MODELS["gpt_oss"] = {kind: kept for kind, kept in KEPT_WITH_EXPERTS.items() if kind != "stock"}  # needs a GPU


def saved(family: str, kind: str, folder: Path) -> None:
    prunable = PrunableModel(tiny_model(family, grouped_query=False, layers=4, head_dim=32))
    kept = tuple(map(min, MODELS[family][kind], prunable.dense_units))  # OLMo's attention has one unit
    prunable.cut(kept)
    if kind == "biased":  # as affine calibration leaves them
        for half, units, dense in zip(prunable.halves, kept, prunable.dense_units, strict=True):
            if 0 < units < dense:
                half.consumer.bias = parameter(torch.linspace(-1, 1, len(half.consumer.weight)))
    in_class = stock_model if kind == "stock" else uneven_model
    in_class(prunable).save_pretrained(folder)


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


def asked_in_vllm(folders: list[Path], work: Path) -> dict[Path, Any]:
    """What vLLM answers for each model, or how it failed on it: a string."""
    found: dict[Path, Any] = {}
    while left := [folder for folder in folders if folder not in found]:
        asked = {"models": list(map(str, left)), "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
        (work / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        command = [str(PYTHON), str(Path(__file__).with_name("vllm_answers.py")), str(work / "asked.json")]
        done = subprocess.run(command, env=environment(work), capture_output=True, text=True, check=False)
        served = [folder for folder in left if (folder / "answers.json").exists()]
        found |= {folder: json.loads((folder / "answers.json").read_text()) for folder in served}
        if len(served) < len(left):
            found[left[len(served)]] = f"vLLM ended with {done.returncode}: {done.stderr[-4000:]}"
    return found


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Models of a family, by kind, and what vLLM made of each."""
    root = tmp_path_factory.mktemp(request.param)
    folders = {kind: root / kind.replace(" ", "-") for kind in MODELS[request.param]}
    for kind, folder in folders.items():
        saved(request.param, kind, folder)
    found = asked_in_vllm(list(folders.values()), root)
    return {kind: (folder, found[folder]) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", [*KEPT, "stock"])
def test_vllm_answers_as_transformers_does(kind: str, served: dict[str, tuple[Path, Any]]) -> None:
    if kind not in served:
        pytest.skip("the family has no such model")
    folder, answers = served[kind]
    assert not isinstance(answers, str), answers
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None  # vLLM was told to ignore it
    ids = torch.tensor(PROMPTS)
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        logits = model(ids).logits[:, :-1].log_softmax(dim=-1)
    expected = logits.gather(2, ids[:, 1:, None])[:, :, 0]
    # A random gpt-oss amplifies rounding: transformers in float32 is up to 3e-4 from itself in float64.
    tolerance = 1e-3 if "gpt_oss" in model.config.model_type else 1e-4
    assert answers["tokens"] == made[:, ids.shape[1] :].tolist()
    torch.testing.assert_close(torch.tensor(answers["log_probabilities"]), expected, atol=tolerance, rtol=0)


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
    uneven_model(prunable).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(demo: Path) -> Iterator[str]:
    """Address of a server that answers as OpenAI's does."""
    port = free_port()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo), "--trust-remote-code"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "pruned"]
    log = (demo.parent / "server.log").open("w")
    process = subprocess.Popen(command, env=environment(demo.parent), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or answers(f"{address}/health"))
        assert process.poll() is None, (demo.parent / "server.log").read_text()[-4000:]
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
