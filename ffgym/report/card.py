"""The model card: the README.md that is saved beside the weights, in the Hugging Face Hub's format."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub.repocard import metadata_load

from ffgym.report.layout import Column, Table, humane
from ffgym.report.table import ReportTable, Row
from ffgym.types import Allocation, Kind, Sublayer

TAGS = ("ffgym", "pruning", "structured-pruning")
LICENSE_KEYS = ("license", "license_name", "license_link")
UNITS: dict[Kind, str] = {
    "attention": "attention: KV groups",
    "mlp": "MLP: intermediate channels",
    "experts": "experts",
}
HALVES: dict[Kind, str] = {"attention": "attention", "mlp": "MLP sublayers", "experts": "experts"}

LOAD_CODE = """\
from transformers import {loader}, AutoTokenizer

folder = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(folder{options})
model = {loader}.from_pretrained(folder{options})"""

UNEVEN = """\
The layers differ in size, which the stock classes of transformers do not read; `trust_remote_code=True` lets it run
the small model class that lies beside the weights."""

REGISTERED = """\
Where ffgym is installed, `import ffgym.models` registers the same class, and the flag is not needed."""

TOWERS = """\
Only the text model was pruned. The other parts, such as the one for images, are those of the dense model."""

STOCK = """\
All layers have the same shape: this is a stock checkpoint of its architecture, and transformers alone loads it."""

LIMITS = (
    "Perplexity on one text says little about answers: measure on your own task before you use the model.",
    "Nothing was fine-tuned after pruning.",
    "Whatever bias and error the dense model has, this one has too, and it may have more.",
)
NO_LICENSE = "The dense model's licence holds for this one, too. None could be read when it was saved."


def model_card(
    *,
    title: str,
    base_model: str | None,
    license: Mapping[str, str],
    table: ReportTable,
    sublayers: Sequence[Sublayer],
    allocation: Allocation,
    quantity: str,
    command: str,
    seed: int,
    splits: Mapping[str, str],
    caveats: Sequence[str] = (),
    stock: bool = False,
    towers: bool = False,
) -> str:
    """The model card of a pruned model: YAML front matter and Markdown.

    Args:
        base_model: the Hub id of the dense model; ``None`` for a model that the Hub does not know.
        license: what is known of the dense model's licence, by the Hub's keys, e.g. ``{"license": "apache-2.0"}``.
        quantity: what its budget counted, e.g. ``"KV-cache bytes"``.
        splits: what each split was made of, e.g. ``{"calibration": "c4.utf8, 32,768 tokens"}``.
        caveats: sentences that a user of the model must read, e.g. that the dense weights were dequantised.
    """
    sections = [
        _front_matter(base_model, license, "image-text-to-text" if towers else "text-generation"),
        f"# {title}",
        _summary(base_model, sublayers, allocation, quantity, table.saved, table.dense),
        "## Load it",
        loading(stock=stock, towers=towers),
        "## What it costs",
        table.layout().markdown().rstrip(),
        "## What was kept",
        _kept(sublayers, allocation),
        "## How it was made",
        f"```console\n$ {command}\n```",
        "\n".join([f"* seed: {seed}", *(f"* {name} split: {text}" for name, text in splits.items())]),
        "The splits do not overlap. Nothing was selected on the report split; it was measured after the search.",
        "## Limits",
        "\n".join(f"* {sentence}" for sentence in (*caveats, *LIMITS, *([] if license else [NO_LICENSE]))),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(base_model: str | None, license: Mapping[str, str], task: str) -> str:
    """Write the Hub's metadata; JSON strings are YAML strings, whatever they contain."""
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    if base_model is not None:
        lines.append(f"base_model: {json.dumps(base_model)}")
    lines += [f"{key}: {json.dumps(value)}" for key, value in license.items()]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in TAGS), "---"])


def stated_license(card: Path | None) -> dict[str, str]:
    """What the card of a model says of its licence, by the Hub's keys; empty where there is none that can be read."""
    if card is None:
        return {}
    try:
        front = metadata_load(card) or {}
    except Exception:  # somebody else wrote it, or nobody
        return {}
    return {key: front[key] for key in LICENSE_KEYS if isinstance(front.get(key), str)}


def loading(*, stock: bool, towers: bool = False) -> str:
    """Show the code that loads a saved model: by transformers' own classes, or with other towers around it."""
    explanation = [STOCK] if stock else [UNEVEN] if towers else [UNEVEN, REGISTERED]
    loader = "AutoModelForImageTextToText" if towers else "AutoModelForCausalLM"
    options = "" if stock else ", trust_remote_code=True"
    code = LOAD_CODE.format(loader=loader, folder="path/to/this/folder", options=options)
    return "\n".join([f"```python\n{code}\n```\n", *explanation, *([TOWERS] if towers else [])])


def _summary(
    base_model: str | None, sublayers: Sequence[Sublayer], allocation: Allocation, quantity: str, saved: Row, dense: Row
) -> str:
    """Say what the model is, and what the pruning cost."""
    there = {sublayer.kind for sublayer in sublayers}
    halves = " and ".join(name for kind, name in HALVES.items() if kind in there)
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a dense language model"
    return (
        f"This is {origin} with {allocation.sparsity:.1%} of the {quantity} of its {halves} removed, by structured "
        "pruning. ffgym searched how much of each sublayer goes.\n\n"
        f'It is the row "{saved.label}" of the table: perplexity {saved.perplexity_text}, where the dense model has '
        f"{dense.perplexity_text}; {humane(saved.parameters)} parameters instead of {humane(dense.parameters)}."
    )


def _kept(sublayers: Sequence[Sublayer], allocation: Allocation) -> str:
    """List the units kept, a line per decoder layer and a column per kind of sublayer that the model has."""
    kept: defaultdict[Kind, defaultdict[int, str]] = defaultdict(lambda: defaultdict(str))
    for sublayer, count in zip(sublayers, allocation.kept, strict=True):
        kept[sublayer.kind][sublayer.layer] = f"{count:,} of {sublayer.units:,}"
    columns: list[Column[int]] = [
        Column("layer", str),
        *(Column(UNITS[kind], by_layer.__getitem__) for kind, by_layer in kept.items()),
    ]
    return Table(columns, sorted({sublayer.layer for sublayer in sublayers})).markdown().rstrip()
