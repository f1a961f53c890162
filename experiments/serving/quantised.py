"""Quantise a pruned GGUF file with llama.cpp's own tool: size and perplexity, dense and pruned.

    python experiments/serving/quantised.py MODEL

MODEL is the folder of a saved model that was made from the demo. `llama-quantize` and `llama-perplexity` have to be on
the PATH. Perplexity is llama.cpp's, on the beginning of demo:wiki in windows of 1,024 tokens, of which it counts the
second halves.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ffgym.data.corpora import load_text
from ffgym.export.format import export
from ffgym.models.loading import checkpoint_folder

TYPES = ("BF16", "Q8_0", "Q4_K_M")
WINDOWS = 16


def perplexity(file: Path, text: Path) -> str:
    """``"20.3 ± 0.5"``."""
    command = ["llama-perplexity", "-m", str(file), "-f", str(text), "-c", "1024", "--chunks", str(WINDOWS)]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", said.stdout + said.stderr)
    assert found, said.stderr[-2000:]
    return f"{float(found[1]):.2f} ± {float(found[2]):.2f}"


def main(pruned: Path) -> None:
    print("| | " + " | ".join(f"{each} | MB" for each in TYPES) + " |")
    print("|---|" + "---:|" * 2 * len(TYPES))
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text"
        text.write_text("\n\n".join(load_text("demo:wiki", role="report").documents)[:200_000], encoding="utf-8")
        for name, folder in (("dense", checkpoint_folder("demo")), ("pruned", pruned)):
            whole = Path(scratch) / f"{name}.gguf"
            export(folder, whole, name="gguf", options={"dtype": "bf16"})
            cells = []
            for kind in TYPES:
                file = whole
                if kind != TYPES[0]:
                    file = whole.with_suffix(f".{kind}")
                    subprocess.run(["llama-quantize", str(whole), str(file), kind], check=True, capture_output=True)
                cells += [perplexity(file, text), f"{file.stat().st_size / 1e6:.0f}"]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
