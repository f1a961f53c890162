"""Pruned, then quantised: the perplexity of GGUF files that llama.cpp's own tools made smaller still.

    python experiments/serving/quantised.py RUN [TYPE ...] > quantised.md

RUN is a folder of `ffgym run --align 256`; types are those of llama-quantize (Q8_0, Q4_K_M and Q4_0 where none is
named). It needs llama-quantize and llama-perplexity on the PATH. The text is the beginning of demo:wiki, in windows of
1,024 tokens of which llama-perplexity counts the second half.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ffgym.data.assets import DEMO_TEXT, fetch
from ffgym.export.format import export
from ffgym.models.loading import checkpoint_folder

TYPES = ("Q8_0", "Q4_K_M", "Q4_0")
CHUNKS = 16


def perplexity(file: Path, text: Path) -> str:
    """What llama-perplexity prints, and its standard error."""
    command = ["llama-perplexity", "-m", str(file), "-f", str(text), "-c", "1024", "--chunks", str(CHUNKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", done.stdout + done.stderr)
    assert found, done.stderr[-2000:]
    return f"{float(found[1]):.2f} ± {float(found[2]):.2f}"


def main(run: Path, types: tuple[str, ...]) -> None:
    text = fetch(DEMO_TEXT) / "wiki.utf8"
    models = {"dense": checkpoint_folder("demo"), "pruned": run / "model"}
    print("| file | " + " | ".join(f"{name}, MB | perplexity" for name in models) + " |")
    print("|---|" + "---:|" * (2 * len(models)))
    with tempfile.TemporaryDirectory() as scratch:
        exported = {name: Path(scratch, f"{name}.gguf") for name in models}
        for name, folder in models.items():
            export(folder, exported[name], name="gguf", options={"dtype": "f16"})
        for kind in ("F16", *types):
            cells = [kind]
            for name, file in exported.items():
                smaller = file if kind == "F16" else Path(scratch, f"{name}-{kind}.gguf")
                if smaller != file:
                    subprocess.run(["llama-quantize", str(file), str(smaller), kind], capture_output=True, check=True)
                cells += [f"{smaller.stat().st_size / 1e6:.1f}", perplexity(smaller, text)]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]) or TYPES)
