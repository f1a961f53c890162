import contextlib
import fnmatch
import json
import logging
import shutil
from functools import partial

import gguf
import numpy as np
import pytest
import torch
import transformers
from distinct_families import DISTINCT_FAMILIES
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from ffgym.errors import ModelError
from ffgym.export.checkpoint import save_pruned
from ffgym.models import placement
from ffgym.models.cut import PrunableModel
from ffgym.models.families import family_of
from ffgym.models.hub import own_card
from ffgym.models.loading import config_of, load
from ffgym.testing.models import tiny_model as random_model

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGE = ("h", "i")
TOKENS = ["<s>", "</s>", *ALPHABET, "".join(MERGE)]
CONFIG = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def tiny_tokenizer():
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(BPE(vocabulary, [MERGE]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama as save_pretrained writes it; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "tiny")


def edit(checkpoint, **values):
    """Change values in a checkpoint's config.json."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | values))


@pytest.fixture(autouse=True)
def nothing_outside(tmp_path, monkeypatch, request):
    """Neither the hub nor the user's cache is touched, except by the demo."""
    if "demo" not in request.keywords:
        monkeypatch.setenv("FFGYM_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_folder_gives_the_model_it_holds(saved):
    loaded = load(str(saved), dtype="float32", device="cpu")
    ids = torch.tensor([loaded.tokenizer("hello").input_ids])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, tiny_model().eval()(ids).logits)
    assert (loaded.name, loaded.description) == (str(saved), "folder tiny")
    assert (loaded.dtype, loaded.device, loaded.context_limit) == (torch.float32, torch.device("cpu"), 128)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_what_was_asked(saved, dtype):
    assert load(str(saved), dtype=dtype, device="cpu").dtype == getattr(torch, dtype)


def test_a_checkpoint_that_does_not_say_its_dtype_is_saved_no_wider_than_its_weights(checkpoint):
    tiny_model().to(torch.bfloat16).save_pretrained(checkpoint)
    edit(checkpoint, dtype=None)
    assert load(str(checkpoint), dtype="float32", device="cpu").saved_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("facts", "chosen"),
    [
        ("flags\t\t: fma avx512_bf16 amx_bf16 amx_tile", torch.bfloat16),
        ("flags\t\t: fma avx512f avx512_bf16 rdpid", torch.bfloat16),
        ("Features\t: asimd svebf16 i8mm bf16 dgh", torch.bfloat16),
        ("flags\t\t: fma avx avx2 bmi2", torch.float32),
        ("flags\t\t: fma avx2 avx512f avx512_vnni", torch.float32),
        (None, torch.float32),
    ],
    ids=["AMX", "AVX512-BF16", "ARM", "AVX2", "AVX512", "no file"],
)
def test_auto_takes_bfloat16_on_a_cpu_that_has_instructions_for_it(saved, tmp_path, monkeypatch, caplog, facts, chosen):
    monkeypatch.setattr(placement, "CPU_FACTS", tmp_path / "cpuinfo")
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: a processor\n{facts}\n")
    with caplog.at_level(logging.INFO, logger="ffgym"):
        loaded = load(str(saved), device="cpu")
    assert loaded.dtype == chosen
    assert str(chosen).removeprefix("torch.") in caplog.text


@pytest.mark.parametrize(("supported", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_cuda_follows_the_gpu(monkeypatch, supported, chosen):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert placement.choose_dtype(torch.device("cuda:1")) == chosen
    assert asked == [torch.device("cuda:1")]


def test_nothing_is_printed_and_the_librarys_progress_bars_come_back(saved, capfd):
    transformers.utils.logging.enable_progress_bar()
    load(str(saved), dtype="float32", device="cpu")
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


# --- GGUF -------------------------------------------------------------------------------------------------------------


def interleave(weight, heads):
    """GGUF stores the rows of q and k in another order than transformers: halves of a head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


# The demo model's.
KINDS = {"down_proj": gguf.GGMLQuantizationType.Q8_0, "up_proj": gguf.GGMLQuantizationType.Q4_1}


def write_gguf(path, architecture, weights):
    """A model of the sizes of CONFIG in a GGUF: float32 but for what KINDS names."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_dimension_count(CONFIG["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(CONFIG["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], CONFIG["num_hidden_layers"])
    for name, weight in weights.items():
        if kind := KINDS.get(name.split(".")[-2]):
            weight = gguf.quantize(weight, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(weight), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    weights = {name: value.numpy() for name, value in tiny_model().state_dict().items()}
    for part, heads in (("q_proj", CONFIG["num_attention_heads"]), ("k_proj", CONFIG["num_key_value_heads"])):
        weights |= {name: interleave(weight, heads) for name, weight in weights.items() if part in name}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf", "llama", weights)


def test_a_gguf_becomes_the_dense_model_it_holds(gguf_file):
    loaded = load(str(gguf_file), dtype="float32", device="cpu")
    assert loaded.description == "tiny-Q8_0.gguf, dequantised from GGUF"
    assert type(loaded.model) is LlamaForCausalLM
    for name, weight in tiny_model().state_dict().items():
        expected = weight
        if kind := KINDS.get(name.split(".")[-2]):
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
        # what is stored is float16: 11 significant bits
        torch.testing.assert_close(loaded.model.state_dict()[name], expected, rtol=2**-11, atol=1e-7)
    assert loaded.tokenizer("hi you").input_ids == tiny_tokenizer()("hi you").input_ids


def test_a_gguf_whose_linears_are_fused_is_read_too(tmp_path):
    model = Phi3ForCausalLM(Phi3Config(**{**CONFIG, "pad_token_id": 1}))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    loaded = load(str(write_gguf(tmp_path / "phi.gguf", "phi3", weights)), dtype="float32", device="cpu")
    for name in ("mlp.gate_up_proj", "self_attn.qkv_proj"):
        expected = model.model.layers[1].get_submodule(name).weight
        torch.testing.assert_close(loaded.model.model.layers[1].get_submodule(name).weight, expected, atol=1e-3, rtol=0)


def test_a_gguf_is_converted_once(gguf_file, monkeypatch, capfd):
    load(str(gguf_file), dtype="float32", device="cpu")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["Converting tiny-Q8_0.gguf to safetensors, once"]
    load(str(gguf_file), dtype="float32", device="cpu")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(gguf, "GGUFReader", None)  # what a large vocabulary takes half a minute in
    assert config_of(str(gguf_file)).dtype == torch.float16


def test_a_changed_gguf_is_converted_again(gguf_file, tmp_path):
    copy = shutil.copy(gguf_file, tmp_path / "tiny.gguf")
    load(str(copy), dtype="float32", device="cpu")
    with open(copy, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    load(str(copy), dtype="float32", device="cpu")
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 2


def test_what_lies_beside_a_gguf_is_not_read(gguf_file, tmp_path):
    """Neither an adapter, with its pickled weights and another base model, nor a tokenizer with code of its own."""
    copy = shutil.copy(gguf_file, tmp_path / "tiny.gguf")
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "someone/other"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({}, tmp_path / "adapter_model.bin")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Own", None]}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    loaded = load(str(copy), dtype="float32", device="cpu")
    assert type(loaded.model) is LlamaForCausalLM
    assert loaded.tokenizer("hi you").input_ids == tiny_tokenizer()("hi you").input_ids


@pytest.mark.parametrize(
    ("name", "complaint"), [("gemma3", "holds no weights"), ("gemma4", "'gemma4' is not supported")]
)
def test_a_gguf_names_its_family_as_llama_cpp_does(tmp_path, name, complaint, monkeypatch):
    """Without tensors: what is not refused for its name is refused for them, before any model is built."""
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("built"))
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=complaint):
        load(str(tmp_path / "empty.gguf"), device="cpu")


def test_a_damaged_gguf_is_an_error_and_leaves_nothing(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF and then nonsense")
    with pytest.raises(ModelError, match=r"bad\.gguf.*cannot be read"):
        load(str(path), device="cpu")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_part_of_a_gguf_says_how_to_join_them(tmp_path):
    path = tmp_path / "tiny-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="one of 3 parts") as caught:
        load(str(path), device="cpu")
    assert caught.value.hint.endswith(f"--merge {path} tiny.gguf")


def test_a_gguf_that_lacks_weights_is_an_error(gguf_file, tmp_path):
    renamed = tmp_path / "tiny.gguf"
    renamed.write_bytes(gguf_file.read_bytes().replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_gone.weight"))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight|cannot be read"):
        load(str(renamed), device="cpu")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_with_a_command_that_converts_them(checkpoint):
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled") as caught:
        load(str(checkpoint))
    command = caught.value.hint.splitlines()[-1].strip()
    assert command.startswith("python -c ")
    exec(command.removeprefix('python -c "').removesuffix('"'), {})
    converted = load(f"{checkpoint}-safetensors", dtype="float32", device="cpu")
    assert torch.equal(converted.model.lm_head.weight, model.lm_head.weight)


def test_mxfp4_codes_are_refused_with_a_command_that_dequantises_them(tmp_path, monkeypatch):
    config = random_model("gpt_oss").config
    config.intermediate_size = 32  # a block of codes
    folder = tmp_path / "quantised"
    GptOssForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj")]:
        experts, inputs, outputs = weights.pop(name).shape
        ones, powers = (torch.full((experts, outputs, inputs // 32, n), 0x22, dtype=torch.uint8) for n in (16, 1))
        weights |= {f"{name}_blocks": ones, f"{name}_scales": powers[..., 0].fill_(127)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ModelError, match=r"the experts of model .* are quantised to MXFP4") as caught:
        load(str(folder))
    monkeypatch.chdir(tmp_path)
    exec(caught.value.hint.splitlines()[-1].strip().removeprefix('python -c "').removesuffix('"'), {})
    converted = load("quantised-bfloat16", dtype="float32", device="cpu")
    assert (converted.model.model.layers[1].mlp.experts.gate_up_proj == 1).all()


def test_missing_weights_are_an_error_and_never_made_up(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, model\.layers\.1\.mlp\.down_proj\.weight first"):
        load(str(checkpoint), device="cpu")


def test_weights_of_another_shape_are_an_error(checkpoint):
    edit(checkpoint, intermediate_size=100)
    with pytest.raises(ModelError, match=r"down_proj\.weight is \(\d+, \d+\) in the checkpoint and \(\d+, 100\) by"):
        load(str(checkpoint), device="cpu")


@pytest.mark.parametrize(
    ("change", "surplus"),
    [({"num_hidden_layers": 1}, r"model\.layers\.1\."), ({"attention_bias": False}, "k_proj.bias")],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_weights_that_the_config_has_no_place_for_are_an_error(checkpoint, change, surplus, streamed):
    config = json.loads((checkpoint / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**config | {"attention_bias": True})).save_pretrained(checkpoint)
    assert load(str(checkpoint), device="cpu").model.config.num_hidden_layers == 2
    edit(checkpoint, **change)
    with pytest.raises(ModelError, match=f"has no place for .*{surplus}"):
        load(str(checkpoint), device="cpu", streamed=streamed)


def test_old_rotary_buffers_and_foreign_towers_are_ignored(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["vision_tower.layers.0.fc.weight"] = torch.ones(4)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    load(str(checkpoint), device="cpu")


def test_code_in_a_checkpoint_is_never_run(checkpoint):
    edit(checkpoint, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="never run"):
        load(str(checkpoint), device="cpu")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "no weights"),
        ("tokenizer*", "holds no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part_is_an_error(checkpoint, remove, message):
    for path in checkpoint.glob(remove):
        path.unlink()
    with pytest.raises(ModelError, match=message):
        load(str(checkpoint), device="cpu")


def test_the_folder_of_a_run_says_where_its_models_are(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model-recovered")
    checkpoint.rename(tmp_path / "model")
    with pytest.raises(ModelError, match="is the folder of a run") as caught:
        load(str(tmp_path), device="cpu")
    for name in ("model", "model-recovered"):
        assert repr(str(tmp_path / name)) in caught.value.hint


def test_the_folder_that_one_stands_in_has_a_name(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    assert load(".", dtype="float32", device="cpu").description == "folder tiny"


def test_an_adapter_is_never_unpickled(checkpoint):
    pytest.importorskip("peft")  # without it transformers does not look at adapters
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(checkpoint)}
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({}, checkpoint / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        load(str(checkpoint), device="cpu", any_family=True)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_adapter_beside_the_weights_is_refused(checkpoint, streamed):
    (checkpoint / "adapter_config.json").write_text("{}")  # of another model, which transformers would load
    with pytest.raises(ModelError, match="holds an adapter: "):
        load(str(checkpoint), device="cpu", dtype="float32", streamed=streamed)
    (checkpoint / "config.json").unlink()
    with pytest.raises(ModelError, match="holds an adapter without its model"):
        load(str(checkpoint), device="cpu", dtype="float32", streamed=streamed)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is no model configuration, or a damaged one"),
        (json.dumps(CONFIG | {"model_type": "llama", "num_hidden_layers": "two"}), "'num_hidden_layers'.*'two'"),
        ('{"model_type": "vit"}', "'vit' is not supported"),
    ],
    ids=["no JSON", "a value of the wrong type", "no causal LM"],
)
def test_a_config_that_says_nothing_usable_is_an_error(checkpoint, content, complaint):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(ModelError, match=complaint):
        load(str(checkpoint), device="cpu")


def test_an_architecture_that_cannot_be_pruned_is_loaded_where_any_will_do(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=400)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        load(str(tmp_path), device="cpu")
    assert load(str(tmp_path), device="cpu", any_family=True).model.config.model_type == "gpt2"


@pytest.mark.parametrize("layers", [10**12, 3, 0, -1])
def test_a_config_with_other_layers_than_the_weights_is_refused_before_any_is_built(checkpoint, layers):
    edit(checkpoint, num_hidden_layers=layers)
    with pytest.raises(ModelError, match=f"num_hidden_layers = {layers}, and the checkpoint has 2 layers"):
        load(str(checkpoint), dtype="float32", device="cpu")


@pytest.mark.parametrize("value", [10**30, 0])
@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
)
def test_a_config_with_other_sizes_than_the_weights_is_refused_before_any_is_built(checkpoint, key, value, monkeypatch):
    edit(checkpoint, **{key: value})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("built"))
    named = value < 1 and key != "intermediate_size"
    said = (
        f"{key} = {value}, and it should be 1 or more" if named else r"does not fit its config\.json|cannot be loaded"
    )
    for read in (config_of, partial(load, dtype="float32", device="cpu")):
        with pytest.raises(ModelError, match=said):
            read(str(checkpoint))


@pytest.mark.parametrize("size", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"])
@pytest.mark.parametrize("value", [2**31, 0])
def test_a_gguf_with_other_sizes_than_its_tensors_is_refused_before_any_is_built(gguf_file, tmp_path, size, value):
    copy = shutil.copy(gguf_file, tmp_path / "changed.gguf")
    field = gguf.GGUFReader(copy, "r+").fields[f"llama.{size}"]
    field.parts[field.data[0]][0] = value
    with pytest.raises(ModelError, match=rf"llama\.{size} = {value} does not fit its tensors"):
        load(str(copy), dtype="float32", device="cpu")


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c", "no.gguf"])
def test_a_missing_folder_or_file_is_an_error(name):
    with pytest.raises(ModelError, match="does not exist"):
        load(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        load(str(tmp_path / "model.safetensors"))


@pytest.fixture
def asked(monkeypatch):
    """The names that a hub without a route was asked for."""
    names = []

    def unreachable(self, name, **options):
        names.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    return names


def test_an_unreachable_hub_is_not_asked_again_for_each_thing_that_is_read_of_a_model(monkeypatch, asked):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    for read in (config_of, partial(load, device="cpu")):
        with pytest.raises(ModelError, match="could not be loaded from the hub"):  # that file is not there
            read("someone/twice-read")
    assert asked == ["someone/twice-read"]


def test_an_unreachable_hub_is_asked_once_and_the_error_says_what_works_without_it(monkeypatch, asked):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("asked"))
    message = r"could not be loaded from the hub: the hub cannot be reached \(no route\)"
    with pytest.raises(ModelError, match=message) as caught:
        load("someone/unreachable", device="cpu")
    assert "'demo'" in caught.value.hint, "what works without it"
    assert asked == ["someone/unreachable"]


@pytest.mark.usefixtures("asked")
def test_a_cached_hub_model_loads_while_the_hub_cannot_be_reached(monkeypatch):
    def loaded(source, **options):
        assert (source, options["local_files_only"]) == ("someone/cached", True)
        raise OSError("enough seen")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    with pytest.raises(ModelError, match="enough seen"):
        load("someone/cached", device="cpu")


def test_a_model_from_the_hubs_cache_names_its_commit_and_says_when_weights_lack(saved, tmp_path, monkeypatch):
    commit = "0123456789abcdef" * 2 + "01234567"
    for name, weights in (("whole", True), ("empty", False)):
        folder = tmp_path / "hub" / f"models--a--{name}"
        shutil.copytree(saved, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        if not weights:
            (folder / "snapshots" / commit / "model.safetensors").unlink()
    gemma = tmp_path / "hub" / "models--a--gemma" / "snapshots" / commit
    gemma.mkdir(parents=True)
    shutil.copytree(gemma.parents[2] / "models--a--whole" / "refs", gemma.parents[1] / "refs")
    (gemma / "config.json").write_text('{"model_type": "gemma4"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load("a/whole", device="cpu").description == "hub model a/whole at 0123456789ab"
    assert own_card("a/whole", None) is None
    card = tmp_path / "hub" / "models--a--whole" / "snapshots" / commit / "README.md"
    card.write_text("---\nlicense: mit\n---\n")
    assert own_card("a/whole", None) == card
    assert own_card(str(card.parent), None) == card
    for streamed in (False, True):
        with pytest.raises(ModelError, match="its weights are not in the hub's cache"):
            load("a/empty", device="cpu", streamed=streamed)
    with pytest.raises(ModelError, match="'gemma4' is not supported"):  # said before its weights are looked for
        load("a/gemma", device="cpu")


def test_what_config_json_says_about_results_does_not_matter(checkpoint):
    edit(checkpoint, return_dict=False, output_attentions=True)
    model = load(str(checkpoint), dtype="float32", device="cpu").model
    with torch.no_grad():
        output = model(torch.tensor([[5, 6]]))
    assert output.logits.shape[:2] == (1, 2)
    assert output.attentions is None


def test_ids_without_a_row_in_the_embedding_are_refused(saved):
    loaded = load(str(saved), dtype="float32", device="cpu")
    rows = loaded.model.config.vocab_size
    loaded.check_ids(torch.tensor([[0, rows - 1]]), "a split")
    with pytest.raises(ModelError, match=f"token {rows} of a split: the embedding of model .* has {rows} rows"):
        loaded.check_ids(torch.tensor([[0, rows]]), "a split")


@pytest.mark.parametrize("shard", ["1GB", "60kB"])
def test_a_streamed_hub_model_is_not_downloaded_in_two_layouts(tmp_path, monkeypatch, shard):
    there, commit = tmp_path / "there", tmp_path / "0123456789abcdef"
    tiny_model().save_pretrained(there, max_shard_size=shard)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"  # a file of its own
    tokenizer.save_pretrained(there)
    wanted = {path.name for path in there.iterdir()}
    (there / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors"):
        (there / name).write_bytes(b"the same once more")

    def download(name, *, revision, allow_patterns, local_files_only):
        assert (name, revision in (None, commit.name), local_files_only) == ("someone/some-model", True, False)
        for path in there.rglob("*"):
            place = path.relative_to(there)
            if path.is_file() and any(fnmatch.fnmatch(str(place), pattern) for pattern in allow_patterns):
                (commit / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, commit / place)
        return str(commit)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = load("someone/some-model", dtype="float32", device="cpu", streamed=True)
    assert loaded.description == "hub model someone/some-model at 0123456789ab"
    assert loaded.tokenizer.chat_template == "{{ messages }}"
    assert {str(path.relative_to(commit)) for path in commit.rglob("*") if path.is_file()} == wanted


def test_a_streamed_hub_model_with_pickled_weights_only_is_refused(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved, tmp_path / "commit", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(ModelError, match="pickled") as caught:
        load("someone/old", dtype="float32", device="cpu", streamed=True)
    assert "save_pretrained('old-safetensors')" in caught.value.hint


def test_a_hub_model_with_pickled_weights_only_is_refused(monkeypatch):
    def reached(*args, **options):
        raise OSError("someone/old does not appear to have a file named model.safetensors and thus cannot be loaded")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", reached)
    with pytest.raises(ModelError, match="pickled") as caught:
        load("someone/old", device="cpu")
    assert "save_pretrained('old-safetensors')" in caught.value.hint


@pytest.mark.parametrize("read", [config_of, partial(load, device="cpu")])
def test_a_revision_belongs_to_the_hub(saved, read, tmp_path):
    for name in (str(saved), "demo"):
        with pytest.raises(ModelError, match="revision"):
            read(name, revision="main")
    assert not (tmp_path / "cache").exists(), "nothing was fetched"


def test_an_unknown_dtype_is_an_error(saved):
    with pytest.raises(ModelError, match="float8") as caught:
        load(str(saved), dtype="float8", device="cpu")
    assert "bfloat16" in caught.value.hint


def test_unknown_and_absent_devices_are_errors(saved, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no device"):
        load(str(saved), device="gpu0")
    for device in ("cuda", "cuda:3", "balanced"):
        with pytest.raises(ModelError, match="torch sees"):
            load(str(saved), device=device)


@pytest.mark.parametrize("elsewhere", ["cpu", "meta"])
def test_a_model_that_does_not_fit_the_gpus_is_an_error(saved, monkeypatch, elsewhere):
    """accelerate then leaves layers on the CPU, or on the disk, whose parameters it says to be on meta."""
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def offload(source, device_map=None, **options):
        assert device_map == "balanced"
        model, report = from_pretrained(source, **options)
        model.model.layers[1].to(elsewhere)
        return model, report

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", offload)
    with pytest.raises(ModelError, match="does not fit the GPUs") as caught:
        load(str(saved), dtype="float32", device="balanced")
    assert "cpu" in caught.value.hint


@pytest.mark.skipif(torch.xpu.is_available(), reason="this torch was built for xpu")
def test_a_device_that_torch_was_not_built_for_is_an_error(saved):
    with pytest.raises(ModelError, match="cannot be moved to xpu"):
        load(str(saved), dtype="float32", device="xpu")


@pytest.mark.parametrize(
    ("raised", "said", "step"),
    [
        (ImportError("Loading a GPTQ model requires optimum (`pip install optimum`)"), "needs .*optimum", "Install it"),
        (
            ValueError("model type `new` but Transformers does not recognize this architecture."),
            "needs .*`new`",
            "--upgrade transformers",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            "does not fit into memory: CUDA out of memory",
            "stream",
        ),
    ],
)
def test_a_model_that_this_installation_cannot_load_is_not_called_damaged(saved, monkeypatch, raised, said, step):
    def fail(*args, **options):
        raise raised

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=said) as caught:
        load(str(saved), dtype="float32", device="cpu")
    assert step in caught.value.hint


# --- what ffgym saved -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DISTINCT_FAMILIES)
def uneven(request, tmp_path_factory, word_tokenizer):
    """A saved model of every family, uneven, with the attention of layer 1 and the MLP of layer 2 gone."""
    prunable = PrunableModel(random_model(request.param))
    prunable.cut((1, 17, 0, 48, 2, 0))
    folder = tmp_path_factory.mktemp("uneven") / "m"
    written = save_pruned(prunable, word_tokenizer, folder, max_shard_size=30_000)
    shards = list(written.path.glob("*.safetensors"))
    assert len(shards) > 1
    assert written.bytes == sum(shard.stat().st_size for shard in shards)
    return prunable, folder


def test_an_uneven_model_is_loaded_bit_by_bit(uneven):
    prunable, folder = uneven
    loaded = load(str(folder), dtype="float32", device="cpu")
    ids = loaded.tokenizer("w1 w2 w3 w4 w5", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, prunable.model(ids).logits)
    with pytest.raises(ModelError, match="already pruned by ffgym"):
        family_of(loaded.model)


def test_a_truncated_or_missing_shard_of_an_uneven_model_is_an_error(uneven, tmp_path):
    shard = sorted(shutil.copytree(uneven[1], tmp_path / "copy").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or incomplete"):
        load(str(shard.parent), device="cpu")
    shard.unlink()
    with pytest.raises(ModelError, match=f"lacks {shard.name}, which its index names"):
        load(str(shard.parent), device="cpu")


def test_a_config_that_says_something_else_than_the_weights_is_an_error(uneven, tmp_path):
    prunable, folder = uneven
    family, no_fit = prunable.family, "does not fit its config.json"
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = (copy / "config.json").read_text()
    for index, change, said in (
        ("0", {family.intermediate: 18}, rf"{no_fit}: .*layers\.0\..* in the checkpoint and .*18.* by the config"),
        ("0", {family.heads: 4}, rf"{no_fit}: .*layers\.0\.self_attn.* in the checkpoint and .*32.* by the config"),
        ("0", {"skip": ["mlp"]}, no_fit),
        ("1", {"skip": []}, "weights are missing|no place"),
        ("1", {"skip": ["norm"]}, r"layer 1: unknown sublayer \['norm'\]"),
    ):
        config = json.loads(content)
        config["per_layer_config"][index] |= change
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=said):
            load(str(copy), device="cpu")


# --- the demo model ---------------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_the_demo_model_is_smollm2_and_says_that_it_was_quantised():
    loaded = load("demo", device="cpu")
    assert loaded.description == "SmolLM2-135M-Instruct, dequantised from Q4_1 GGUF"
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    config = loaded.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    ids = torch.tensor([loaded.tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        following = loaded.model(ids).logits[0, -1].argmax().item()
    assert loaded.tokenizer.decode([following]).strip() == "Paris"
