"""A GGUF file is the model in the folder: llama.cpp computes the same from it, or it is refused and not there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import PRE_TOKENIZERS, byte_level, sentencepiece
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from ffgym.cli import app
from ffgym.errors import ConfigError, ModelError, OutputError
from ffgym.export.checkpoint import save_pruned
from ffgym.export.format import Exported, export
from ffgym.export.gguf.architectures import ARCHITECTURES
from ffgym.export.gguf.gguf import run_line
from ffgym.models.cut import PrunableModel
from ffgym.models.families import family_of_type
from ffgym.models.loading import config_of, load
from ffgym.pruning.calibration import PlainPath
from ffgym.testing.models import TINY_FAMILIES, tiny_model

IDS = torch.randint(3, 128, (100,), generator=torch.Generator().manual_seed(7))
# Units kept by the six sublayers of three layers; a model has 2 KV groups a layer (4 without grouping), 48 channels.
UNEVEN = (1, 17, 2, 48, 1, 5)
EVEN = (1, 30, 1, 30, 1, 30)
EMPTIED = (1, 17, 0, 48, 2, 0)
# float32 throughout: what two orders of summing the same float32 numbers may differ by, on logits of about 6.
LOGITS, LOSS = 1e-4, 1e-6


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def pruned(family: str, kept: Sequence[int] | None, *, biases: bool = False, tied: bool = False, **options: Any) -> Any:
    """A tiny model cut to an allocation (``None``: not at all), as affine calibration leaves it if asked for."""
    model: Any = tiny_model(family, **options)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    prunable = PrunableModel(model)
    if kept is not None:
        prunable.cut(kept)
    for half, units, dense in zip(prunable.halves, prunable.kept, prunable.dense_units, strict=True):
        if biases and units < dense:
            half.path = PlainPath(half.dense_consumer[0], torch.linspace(-1, 1, 32))
            half.cut(units)
    return SimpleNamespace(model=model, prunable=None if kept is None else prunable)


def save(case: Any, folder: Path, tokenizer: Any = None) -> Path:
    tokenizer = tokenizer or byte_level()
    if case.prunable is None:
        case.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        save_pruned(case.prunable, tokenizer, folder)
    return folder


def export_gguf(folder: Path, file: Path, *, dtype: str | None = None, **options: Any) -> Exported:
    return export(folder, file, name="gguf", options={} if dtype is None else {"dtype": dtype}, **options)


def with_rope(case: Any, **rope: Any) -> Any:
    """The model with another rotary embedding, which its config alone decides."""
    case.model.config.rope_parameters = {"rope_theta": 10000.0, **rope}
    case.model.model.rotary_emb = type(case.model.model.rotary_emb)(case.model.config)
    return case


def with_config(family: str, **settings: Any) -> Any:
    """A dense model whose config says something else."""
    case = pruned(family, None)
    case.model.config.update(settings)
    return case


def biased_everywhere() -> Any:
    """A Llama whose config asks for a bias in every linear."""
    config = tiny_model("llama").config
    config.attention_bias = config.mlp_bias = True
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.25 * torch.randn_like(parameter))
    prunable = PrunableModel(model)
    prunable.cut(UNEVEN)
    return SimpleNamespace(model=model, prunable=prunable)


LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# What is written -> llama.cpp's architecture for it.
WRITTEN: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (lambda: pruned("llama", None), "llama"),
    "llama-uneven": (lambda: pruned("llama", UNEVEN), "deci"),
    "llama-multi-head": (lambda: pruned("llama", (1, 17, 3, 48, 4, 5), grouped_query=False), "deci"),
    "llama-even": (lambda: pruned("llama", EVEN), "llama"),
    "llama-emptied": (lambda: pruned("llama", EMPTIED), "deci"),
    "llama-affine": (lambda: pruned("llama", UNEVEN, biases=True), "deci"),
    "llama-affine-even": (lambda: pruned("llama", EVEN, biases=True), "llama"),
    "llama-affine-emptied": (lambda: pruned("llama", EMPTIED, biases=True), "deci"),
    "llama-affine-empty-layer": (lambda: pruned("llama", (1, 9, 0, 0, 0, 0), biases=True), "deci"),
    "llama-biases": (biased_everywhere, "deci"),
    "llama-tied": (lambda: pruned("llama", UNEVEN, tied=True), "deci"),
    "llama-3-rope": (lambda: with_rope(pruned("llama", UNEVEN), **LLAMA_3_ROPE), "deci"),
    "llama-3-rope-even": (lambda: with_rope(pruned("llama", EVEN), **LLAMA_3_ROPE), "llama"),
    "llama-linear-rope": (lambda: with_rope(pruned("llama", EVEN), rope_type="linear", factor=2.0), "llama"),
    "mistral-uneven": (lambda: pruned("mistral", UNEVEN), "deci"),
    "qwen2-uneven": (lambda: pruned("qwen2", UNEVEN), "deci"),
    "qwen2-even": (lambda: pruned("qwen2", EVEN), "deci"),
    "qwen2-mlps": (lambda: pruned("qwen2", (2, 30) * 3), "qwen2"),
    "qwen2-affine-emptied": (lambda: pruned("qwen2", EMPTIED, biases=True), "deci"),
    "qwen3": (lambda: pruned("qwen3", None), "qwen3"),
    "qwen3-even": (lambda: pruned("qwen3", EVEN), "qwen3"),
    "qwen3-tied-uneven": (lambda: pruned("qwen3", UNEVEN, tied=True), "openelm"),
    "qwen3-tied-no-mlp": (lambda: pruned("qwen3", (1, 17, 2, 0, 1, 5), tied=True), "openelm"),
}
GEMMAS: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma": (lambda: pruned("gemma", None), "gemma"),
    "gemma-even": (lambda: pruned("gemma", EVEN), "gemma"),
    "gemma2": (lambda: pruned("gemma2", None), "gemma2"),
    "gemma2-even": (lambda: pruned("gemma2", EVEN), "gemma2"),
    "gemma3": (lambda: pruned("gemma3_text", None), "gemma3"),
    "gemma3-even": (lambda: pruned("gemma3_text", EVEN), "gemma3"),
}


# --- what llama.cpp computes ------------------------------------------------------------------------------------------


def runtime(path: Path, **options: Any) -> Any:
    """The file in llama.cpp, on one thread; by default everything is float32, the cache too."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[llama-cpp]'")
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    sizes = {"n_ctx": 128, "n_batch": 128, "n_threads": 1, "n_threads_batch": 1}
    return llama_cpp.Llama(str(path), logits_all=True, verbose=False, **sizes, **(exact | options))


def logits_of(llama: Any, ids: torch.Tensor) -> torch.Tensor:
    llama.reset()
    llama.eval(ids.tolist())
    return torch.from_numpy(llama.scores[: len(ids)].copy())


def loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:]).item()


def expected(case: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = case.model.float()(IDS[None]).logits[0]
    return logits


@pytest.mark.parametrize("name", WRITTEN)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    make, architecture = WRITTEN[name]
    case = make()
    written = export_gguf(save(case, tmp_path / "m"), tmp_path / "m.gguf")
    assert (written.architecture, written.dtype) == (architecture, "f32")
    ours, theirs = expected(case), logits_of(runtime(written.path), IDS)
    assert (theirs - ours).abs().max() < LOGITS
    assert loss(theirs, IDS) == pytest.approx(loss(ours, IDS), abs=LOSS)


@pytest.mark.parametrize("name", GEMMAS)
def test_gemma_agrees_up_to_llama_cpps_table_of_gelu(name: str, tmp_path: Path) -> None:
    # ggml looks GELU up in a table of float16: 11 significant bits in the middle of every MLP.
    make, architecture = GEMMAS[name]
    case = make()
    written = export_gguf(save(case, tmp_path / "m"), tmp_path / "m.gguf")
    assert written.architecture == architecture
    ours, theirs = expected(case), logits_of(runtime(written.path), IDS)
    assert (theirs - ours).abs().max() < 2e-2
    assert loss(theirs, IDS) == pytest.approx(loss(ours, IDS), abs=2e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 1e-3), ("bf16", 5e-3)])
def test_half_precision_costs_its_rounding_and_no_more(dtype: str, tolerance: float, tmp_path: Path) -> None:
    case = pruned("llama", UNEVEN)
    written = export_gguf(save(case, tmp_path / "m"), tmp_path / "m.gguf", dtype=dtype)
    assert written.dtype == dtype
    assert loss(logits_of(runtime(written.path), IDS), IDS) == pytest.approx(loss(expected(case), IDS), abs=tolerance)


TEXTS = [
    "The thing and the other, 1234 and 12 in 2024's winds.\n\n  Then   three spaces\tand a tab ... it's DON'T",
    "  leading and trailing  ",
    "a<tool>b <tool> <eos> the<bos>and",
    "1    2  the \n the\n\n\nthe",
    "",
]
WITHOUT_ODD_SPACES = [
    "The thing and  the other, 1234 and 12 in 2024's winds.\n\nThen",
    "a<tool>b<tool><eos>the<bos>and",
    "é and ü: 中文 the 😀",
]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("add_bos", [False, True])
def test_byte_level_text_is_split_the_same(pre: str, add_bos: bool, tmp_path: Path) -> None:
    tokenizer = byte_level(pre, add_bos=add_bos)
    llama = runtime(export_gguf(save(pruned("llama", UNEVEN), tmp_path / "m", tokenizer), tmp_path / "m.gguf").path)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=add_bos, special=True) == tokenizer(text).input_ids, text
    assert bool(llama._model.add_bos_token()) is add_bos


@pytest.mark.parametrize("options", [{}, {"legacy": True}, {"space_prefix": False}], ids=str)
def test_sentencepiece_text_is_split_the_same(options: dict[str, bool], tmp_path: Path) -> None:
    tokenizer = sentencepiece(**options)
    config = LlamaConfig(vocab_size=len(tokenizer) + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=128)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    llama = runtime(export_gguf(tmp_path / "m", tmp_path / "m.gguf").path)
    # Metaspace puts no space before a space; SentencePiece and llama.cpp do.
    for text in [*WITHOUT_ODD_SPACES, *(TEXTS if options else [])]:
        assert llama.tokenize(text.encode(), special=True) == tokenizer(text).input_ids, text


def test_the_printed_command_runs(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    written = export_gguf(save(pruned("llama", UNEVEN), tmp_path / "m"), tmp_path / "it's a model.gguf")
    command = shlex.split(run_line(written.path))
    assert command[0] == "python"
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


# --- what the file says -----------------------------------------------------------------------------------------------


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_sizes_are_lists_where_layers_differ_and_numbers_where_not(tmp_path: Path) -> None:
    uneven = fields(export_gguf(save(pruned("llama", EMPTIED), tmp_path / "u"), tmp_path / "u.gguf").path)
    assert uneven["general.architecture"] == "deci"
    assert uneven["deci.attention.head_count"] == [2, 0, 4]
    assert uneven["deci.attention.head_count_kv"] == [1, 0, 2]
    assert uneven["deci.feed_forward_length"] == [17, 48, 1]
    assert (uneven["deci.attention.key_length"], uneven["deci.rope.dimension_count"]) == (8, 8)
    even = fields(export_gguf(save(pruned("llama", EVEN), tmp_path / "e"), tmp_path / "e.gguf").path)
    assert (even["llama.attention.head_count"], even["llama.attention.head_count_kv"]) == (2, 1)
    assert even["llama.feed_forward_length"] == 30
    assert (even["llama.block_count"], even["llama.context_length"], even["general.name"]) == (3, 128, "e")


@pytest.mark.parametrize(
    ("dtype", "given", "kinds", "file_type"),
    [
        (torch.float32, None, {"F32"}, 0),
        (torch.bfloat16, None, {"F32", "BF16"}, 32),
        (torch.float16, None, {"F32", "F16"}, 1),
        (torch.bfloat16, "f16", {"F32", "F16"}, 1),
        (torch.bfloat16, "f32", {"F32"}, 0),
    ],
)
def test_matrices_have_the_dtype_and_vectors_stay_float32(
    dtype: torch.dtype, given: str | None, kinds: set[str], file_type: int, tmp_path: Path
) -> None:
    written = export_gguf(save(pruned("llama", UNEVEN, dtype=dtype), tmp_path / "m"), tmp_path / "m.gguf", dtype=given)
    reader = gguf.GGUFReader(written.path)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == kinds
    assert all(tensor.tensor_type.name == "F32" for tensor in reader.tensors if len(tensor.shape) == 1)
    assert reader.fields["general.file_type"].contents() == file_type
    assert written.bytes == written.path.stat().st_size
    assert written.parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)


def test_bfloat16_weights_are_written_bit_by_bit(tmp_path: Path) -> None:
    case = pruned("llama", UNEVEN, dtype=torch.bfloat16)
    written = export_gguf(save(case, tmp_path / "m"), tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written.path).tensors}
    stored = torch.from_numpy(tensors["blk.1.ffn_down.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(stored, case.model.model.layers[1].mlp.down_proj.weight)


def test_notes_say_what_differs(tmp_path: Path) -> None:
    assert export_gguf(save(pruned("llama", UNEVEN), tmp_path / "a"), tmp_path / "a.gguf").notes == ()
    (note,) = export_gguf(save(pruned("llama", EMPTIED), tmp_path / "b"), tmp_path / "b.gguf").notes
    assert "layers 2" in note
    assert "one channel of zeros" in note
    case = pruned("mistral", UNEVEN)
    case.model.config.sliding_window = 64
    written = export_gguf(save(case, tmp_path / "c"), tmp_path / "c.gguf")
    assert "64 tokens, the model's sliding window" in written.notes[0]
    assert fields(written.path)["deci.context_length"] == 64
    windowed = export_gguf(save(pruned("gemma3_text", None), tmp_path / "d"), tmp_path / "d.gguf")
    assert (windowed.notes, fields(windowed.path)["gemma3.context_length"]) == ((), 128)


def test_shards_are_read(tmp_path: Path) -> None:
    case = pruned("llama", UNEVEN)
    whole = export_gguf(save(case, tmp_path / "m"), tmp_path / "whole.gguf")
    folder = tmp_path / "shards"
    save_pruned(case.prunable, byte_level(), folder, max_shard_size=30_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    name = tmp_path / "again" / "whole.gguf"  # the file's name is in it
    assert export_gguf(folder, name).path.read_bytes() == whole.path.read_bytes()


# --- back into ffgym --------------------------------------------------------------------------------------------------


READ_AGAIN = ("llama", "llama-even", "qwen2-mlps")
UNEVEN_FILE = r"m\.gguf' differ in size .*feed_forward_length is a list"
# What ffgym does not read again, and why.
NOT_READ_AGAIN = {
    **dict.fromkeys(sorted(WRITTEN.keys() - set(READ_AGAIN)), r"m\.gguf"),
    **dict.fromkeys(("llama-uneven", "qwen3-tied-uneven"), UNEVEN_FILE),
    "llama-linear-rope": r"scaled \(llama\.rope\.scaling\.type\)",
    "llama-3-rope-even": r"scaled \(rope_freqs\.weight\)",
    "llama-affine-even": r"holds [\d,]+ numbers, and transformers would take [\d,]+ of them",
}


@pytest.mark.parametrize("name", READ_AGAIN)
def test_a_file_is_loaded_as_what_it_is(name: str, tmp_path: Path) -> None:
    case = WRITTEN[name][0]()
    written = export_gguf(save(case, tmp_path / "m"), tmp_path / "m.gguf")
    loaded = load(str(written.path), dtype="float32", device="cpu")
    with torch.no_grad():  # a GGUF is dequantised to float16, whose rounding is within 0.03 here
        torch.testing.assert_close(loaded.model(IDS[None]).logits[0], expected(case), atol=0.1, rtol=0)
    assert loaded.tokenizer("the winds").input_ids == byte_level()("the winds").input_ids


@pytest.mark.parametrize(
    ("family", "layers", "kept", "scalar"),
    [
        ("gemma2", 3, (2, 48), 8),  # the channels of a head
        ("gemma3_text", 1, (2, 48), 8),
        ("gemma2", 46, (1, 30), 16),  # as deep as Gemma 2 27B: the hidden size, 32, over the 2 heads that are left
    ],
)
def test_gemma_scales_attention_scores_as_llama_cpp_does(
    family: str, layers: int, kept: tuple[int, int], scalar: int, tmp_path: Path
) -> None:
    case = pruned(family, kept * layers, layers=layers)
    case.model.config.query_pre_attn_scalar = scalar
    written = export_gguf(save(case, tmp_path / "m"), tmp_path / "m.gguf")
    loaded = load(str(written.path), dtype="float32", device="cpu").model
    assert loaded.config.query_pre_attn_scalar == scalar
    if layers < 46:  # float16's rounding grows with the depth
        torch.testing.assert_close(loaded(IDS[None]).logits[0], expected(case), atol=0.1, rtol=0)


@pytest.mark.parametrize(("name", "reason"), NOT_READ_AGAIN.items())
def test_a_file_that_would_be_another_model_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    written = export_gguf(save(WRITTEN[name][0](), tmp_path / "m"), tmp_path / "m.gguf")
    for read in (load, config_of) if reason == UNEVEN_FILE else (load,):
        with pytest.raises(ModelError, match=reason) as raised:
            read(str(written.path))
        assert raised.value.hint


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(case: Any, tmp_path: Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as raised:
        export_gguf(save(case, tmp_path / "m"), tmp_path / "m.gguf", **options)
    assert raised.value.hint
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["m"]
    return raised.value


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda: pruned("opt", (4, 17, 4, 48, 4, 5)), "does not write models of family 'opt'", "docs/models.md"),
        (lambda: pruned("gemma", UNEVEN), r"gemma reads one size for all layers \(layer 1", "--uniform"),
        (lambda: pruned("qwen3", UNEVEN), "reads one size.*; .*openelm has no output matrix of its own", "--uniform"),
        (lambda: pruned("qwen3", EMPTIED, tied=True), r"needs attention in every layer \(layer 1", "min_units=1"),
        (lambda: pruned("qwen3", EVEN, biases=True), r"qwen3 reads no bias of o_proj \(layer 0", "--calibration ridge"),
        (lambda: pruned("gemma", EVEN, biases=True), "gemma reads no bias of o_proj", "--calibration ridge"),
        (lambda: pruned("gemma3_text", UNEVEN), r"gemma3 reads one size for all layers \(layer 1", "--uniform"),
        (lambda: pruned("gemma", UNEVEN, biases=True), "and reads no bias", "shape. Prune with --calibration ridge"),
        (lambda: with_rope(pruned("qwen3", UNEVEN), **LLAMA_3_ROPE), "reads one size.* and reads no factors", "docs/"),
        (lambda: with_config("gemma3_text", query_pre_attn_scalar=16), "by the root of 8, not of 16", "transformers"),
        (lambda: with_config("llama", hidden_act="relu"), "computes silu, not relu", "transformers"),
        (lambda: with_config("gemma2", attn_logit_softcapping=None), "gemma2 caps attention scores", "transformers"),
        (lambda: with_rope(pruned("llama", UNEVEN), rope_type="yarn", factor=2.0), "'yarn'", "default, linear"),
        (lambda: with_rope(pruned("qwen3", EVEN), **LLAMA_3_ROPE), "qwen3 reads no factors for rotary", "transformers"),
    ],
    ids=lambda value: None if callable(value) else value[:24],
)  # fmt: skip
def test_what_llama_cpp_cannot_say_is_refused_by_name(
    make: Callable[[], Any], message: str, hint: str, tmp_path: Path
) -> None:
    error = refused(make(), tmp_path)
    assert re.search(message, error.message)
    assert hint in str(error.hint)


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    case = pruned("llama", UNEVEN)
    with torch.no_grad():
        case.model.lm_head.weight[3, 4] = 1e6
    error = refused(case, tmp_path, dtype="f16")
    assert "output.weight has weights that float16 cannot hold" in error.message
    assert "--dtype bf16" in str(error.hint)


def test_an_output_matrix_that_only_the_config_calls_tied_is_written(tmp_path: Path) -> None:
    source = save(pruned("llama", None), tmp_path / "m")
    edit(source / "config.json", tie_word_embeddings=True)
    written = export_gguf(source, tmp_path / "m.gguf")
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(written.path).tensors}


def test_an_unknown_dtype_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype = 'q4_0': should be 'f32', 'f16' or 'bf16'") as raised:
        export_gguf(tmp_path / "nothing", tmp_path / "m.gguf", dtype="q4_0")
    assert "llama-quantize" in str(raised.value.hint)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


HEAD, LAST, EXTRA = "lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.0.extra.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 9999), "damaged or incomplete"),
        (lambda folder: rewrite(folder, lambda w: w.pop(LAST)), f"{LAST} is missing"),
        (
            lambda folder: rewrite(folder, lambda w: w.update({EXTRA: torch.ones(2)})),
            f"no place for {EXTRA}",
        ),
        (lambda folder: rewrite(folder, lambda w: w.update({HEAD: w[HEAD].char()})), f"{HEAD} is I8"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "no tokenizer"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "is no generation configuration"),
        (lambda folder: edit(folder / "config.json", vocab_size=100), r"has shape \(128, 32\), and config.json says"),
        (
            lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "gptq"}),
            "a quantised model",
        ),
    ],
    ids=lambda value: None if callable(value) else value[:24],
)
def test_a_damaged_folder_is_refused_and_nothing_is_left(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    folder = save(pruned("llama", None), tmp_path / "m")
    damage(folder)
    with pytest.raises(ModelError, match=message) as raised:
        export_gguf(folder, tmp_path / "m.gguf")
    assert raised.value.hint
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_checkpoint_of_the_base_model_alone_says_how_to_get_a_whole_one(tmp_path: Path) -> None:
    tiny_model("gemma").model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    byte_level().save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"embed_tokens\.weight is missing") as raised:
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert "load it with AutoModelForCausalLM, and save it again" in str(raised.value.hint)
    AutoModelForCausalLM.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "m")
    assert export_gguf(tmp_path / "m", tmp_path / "m.gguf").path.is_file()


def test_a_missing_folder_is_refused_and_in_that_of_a_run_the_model_is_found(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        export_gguf(tmp_path / "nowhere", tmp_path / "m.gguf")
    save(pruned("llama", UNEVEN), tmp_path / "run" / "model")
    assert export_gguf(tmp_path / "run", tmp_path / "m.gguf").path.is_file()


def test_a_model_in_the_hubs_cache_is_written_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, commit = tmp_path / "hub" / "models--some--one", "0" * 40
    save(pruned("llama", None), place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert export_gguf(Path("some/one"), tmp_path / "m.gguf").path.is_file()
    with pytest.raises(ModelError, match="'some/other' does not exist"):
        export_gguf(Path("some/other"), tmp_path / "m.gguf", overwrite=True)


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(pruned("llama", UNEVEN), tmp_path / "m")


def test_a_file_that_is_there_is_replaced_only_when_told(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "m.gguf"
    place.write_text("mine")
    with pytest.raises(OutputError, match="exists") as raised:
        export_gguf(folder, place)
    assert "--overwrite" in str(raised.value.hint)
    assert place.read_text() == "mine"
    assert export_gguf(folder, place, overwrite=True).path.read_bytes()[:4] == b"GGUF"


def test_other_names_and_places_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="ends in"):
        export_gguf(folder, folder / "config.json", overwrite=True)
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        export_gguf(folder, tmp_path / "d.gguf", overwrite=True)
    with pytest.raises(OutputError, match="cannot write"):
        export_gguf(folder, folder / "config.json" / "m.gguf")
    assert export_gguf(folder, tmp_path / "a" / "b" / "m.gguf").path.is_file()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(folder: Path, tmp_path: Path, small_files: Any) -> None:
    place = tmp_path / "out" / "m.gguf"
    place.parent.mkdir()
    place.write_text("old")
    with pytest.raises(OutputError, match="cannot write"), small_files(40_000):  # the weights do not fit
        export_gguf(folder, place, overwrite=True)
    assert place.read_text() == "old"
    assert [path.name for path in place.parent.iterdir()] == ["m.gguf"]


def test_progress_begins_at_0_and_reaches_the_end(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export_gguf(folder, tmp_path / "m.gguf", progress=lambda done, total: seen.append((done, total)))
    total = len(gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert seen == [(done, total) for done in range(total + 1)]


# --- the command ------------------------------------------------------------------------------------------------------


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["export", *arguments])


def test_the_command_says_what_it_wrote_and_how_to_run_it(folder: Path, tmp_path: Path) -> None:
    done = call(str(folder), "--gguf", str(tmp_path / "m.gguf"), "--dtype", "bf16")
    assert done.exit_code == 0, done.output
    size = (tmp_path / "m.gguf").stat().st_size
    assert f"{tmp_path / 'm.gguf'}: {size / 1e3:.1f} kB, " in done.stdout
    assert " k parameters in bf16, architecture deci" in done.stdout
    assert run_line(tmp_path / "m.gguf") in done.stdout
    assert "write m.gguf: done" in done.stderr


def test_two_dtypes_are_refused(folder: Path, tmp_path: Path) -> None:
    done = call(str(folder), "--gguf", str(tmp_path / "m.gguf"), "--dtype", "f16", "--set", "dtype=f32")
    assert done.exit_code == 2
    assert "'f16', and --set dtype says 'f32'" in done.stderr
    assert call(str(folder)).exit_code == 2, "nor is none at all a format"


def test_json_is_all_there_is_on_stdout(folder: Path, tmp_path: Path) -> None:
    done = call(str(folder), "--gguf", str(tmp_path / "m.gguf"), "--json")
    data = json.loads(done.stdout)
    assert data["run"] == run_line(tmp_path / "m.gguf")
    assert data.keys() == {field.name for field in dataclasses.fields(Exported)}
    assert (data["path"], data["architecture"], data["notes"]) == (str(tmp_path / "m.gguf"), "deci", [])


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_family_is_written_or_refused_on_purpose() -> None:
    assert ARCHITECTURES.keys() <= set(gguf.MODEL_ARCH_NAMES.values())
    for name in TINY_FAMILIES:
        assert set(family_of_type(name).gguf) <= ARCHITECTURES.keys()
