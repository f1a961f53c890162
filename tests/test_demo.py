"""The command a newcomer types, on the demo model, with the smallest budget that still goes through every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.data.assets import DEMO_TEXT, fetch
from ffgym.data.cache import cache_dir

SETTINGS = {
    "data.window": 128,
    "data.calibration_tokens": 512,
    "data.search_tokens": 512,
    "data.report_tokens": 256,
    "prune.ridge": 0.1,
    "search.episodes": 8,  # one that follows a slope, which costs four, then two updates
    "search.episode_tokens": 128,
    "search.episodes_per_update": 2,
    "search.final_tokens": 128,
    "search.finalists": 2,
    "search.random_baseline": "false",
}
LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "ffgym" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # without, it asks
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True)
print(tokenizer.decode(out[0]))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which the demo was run, which the command had never seen, and what it said."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "FFGYM_CACHE": str(cache_dir().resolve()), "COLUMNS": "120"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    options = (part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}"))
    command = [sys.executable, "-m", "ffgym", "run", "--agent", "reinforce", "--criterion", "wanda", "--output", "out"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder, env=environment)
    print(f"{done.stdout}\n{done.stderr}")  # shown where a test fails
    return folder, done


@pytest.mark.demo
def test_the_demo_ends_in_a_smaller_model_that_loads_and_generates(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = demo
    out = folder / "out"
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    for part in ("dense", "uniform + ridge", "mlp-first", "reinforce, plain", "reinforce + ridge", "dequantised"):
        assert part in done.stdout
    rows = json.loads((out / "report.json").read_text())
    assert len(rows) == 5
    dense, *pruned = rows
    assert all(row["perplexity"] > dense["perplexity"] > 1 for row in pruned)
    assert all(row["sparsity_prunable"] == pytest.approx(0.2, abs=1e-3) for row in pruned)
    assert (folder / "mlruns" / "mlflow.db").exists()

    # Bytes per parameter are those of the dtype, so the file is smaller by what the parameters say.
    size = sum(file.stat().st_size for file in (out / "model").glob("*.safetensors"))
    width = round(size / rows[-1]["costs"]["params"])
    assert width in (2, 4)
    assert size < width * dense["costs"]["params"] * 0.9
    assert size == pytest.approx(width * rows[-1]["costs"]["params"], rel=1e-3)

    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(out / "model")],
        capture_output=True,
        text=True,
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("The capital of France is")
    print(loaded.stdout)


@pytest.mark.demo
def test_the_pruned_demo_has_the_same_perplexity_in_llama_cpp(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import ffgym.models  # noqa: F401 (registers the class that the folder needs)

    folder, _ = demo
    out = folder / "out"
    command = ["export", str(out / "model"), "--gguf", str(folder / "demo.gguf"), "--dtype", "f32", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    written = json.loads(done.stdout)
    assert (written["architecture"], written["dtype"], written["notes"]) == ("deci", "f32", [])
    assert written["parameters"] == json.loads((out / "report.json").read_text())[-1]["costs"]["params"]

    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    # No rounding but float32's on either side.
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    sizes = {"n_ctx": 256, "n_batch": 256, "n_threads": threads, "n_threads_batch": threads}
    llama = llama_cpp.Llama(written["path"], logits_all=True, verbose=False, **exact, **sizes)

    text = (fetch(DEMO_TEXT) / "wiki.utf8").read_text(encoding="utf-8")[20_000:40_000]
    ids = tokenizer(text).input_ids
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == ids
    window = torch.tensor(ids[:256])
    with torch.no_grad():
        ours = model(window[None]).logits[0]
    llama.eval(window.tolist())
    theirs = torch.from_numpy(llama.scores[: len(window)].copy())
    losses = [torch.nn.functional.cross_entropy(logits[:-1].double(), window[1:]) for logits in (ours, theirs)]
    print([loss.item() for loss in losses], (ours - theirs).abs().max())  # shown where the test fails
    assert losses[1].exp().item() == pytest.approx(losses[0].exp().item(), rel=1e-5)
    completion = llama("The capital of France is", max_tokens=8, temperature=0.0)
    assert completion["usage"]["completion_tokens"] > 0
