"""A saved model is the model: same bits in another process, right with a KV cache, and never half there."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from processes import fresh
from safetensors.torch import load_file, save_file
from tiny_tokenizers import byte_level
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    StaticCache,
    pipeline,
)

from ffgym.errors import ModelError, OutputError
from ffgym.export.checkpoint import SavedModel, load_line, save_pruned
from ffgym.export.refresh import refresh
from ffgym.models.cut import PrunableModel
from ffgym.models.families import family_of_type
from ffgym.models.loading import load as load_model
from ffgym.models.modeling_ffgym import FFGymLlamaConfig, FFGymMistralConfig, FFGymQwen2Config
from ffgym.models.sublayer import parameter
from ffgym.testing.models import EXPERT_FAMILIES, TINY_FAMILIES, tiny_model

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(7))
VARIANTS = [(f, True) for f in TINY_FAMILIES] + [(f, False) for f in DISTINCT_FAMILIES if family_of_type(f).kv_heads]
# Units kept by the six sublayers of three layers; a model has 2 or 4 KV groups a layer and 48 channels.
UNEVEN = (1, 17, 2, 48, 1, 5)
EMPTIED = (1, 17, 0, 48, 2, 0)
SEVERAL = (1, 17, 0, 0, 0, 5)  # attention gone from all layers but the first, and the MLP between

# Runs in a fresh process: loads every saved model of a folder and says whether it is what was in memory.
CHECK = """
import json, pathlib, sys
root = pathlib.Path(sys.argv[1])
sys.modules["ffgym"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
found, head = {}, {"lm_head.weight", "lm_head.bias"}
options = {"trust_remote_code": True}
for folder in sorted(root.iterdir()):
    expected = load_file(root.parent / f"{folder.name}.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    base, report = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    with torch.no_grad():
        hidden = base(expected["ids"]).last_hidden_state, model.base_model(expected["ids"]).last_hidden_state
        logits = model(expected["ids"]).logits
        tokens = model.generate(expected["ids"], max_new_tokens=4, do_sample=False)
    found[folder.name] = {
        "bit_equal": torch.equal(logits, expected["logits"]),
        "bit_equal_without_head": torch.equal(*hidden),
        "left_over": [name for names in report.values() for name in names if name not in head],
        "same_tokens": torch.equal(tokens, expected["tokens"]),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    }
print(json.dumps(found))
"""


def fitting(kept, family):
    """An allocation of three layers as a family can have it: OLMo's attention is one unit."""
    most = 1 if family_of_type(family).whole_attention else 4
    return tuple(units if sublayer % 2 else min(units, most) for sublayer, units in enumerate(kept))


def pruned(family, kept, *, grouped_query=True, biases=False):
    """A tiny model cut to an allocation; with new biases in some of its consumers if asked for."""
    prunable = PrunableModel(tiny_model(family, grouped_query=grouped_query))
    kept = fitting(kept, family)
    prunable.cut(kept)
    if biases:  # as affine calibration leaves them: in the sublayers that were cut, and in no other
        for half, units, dense in zip(prunable.halves, kept, prunable.dense_units, strict=True):
            if 0 < units < dense:
                half.consumer.bias = parameter(torch.linspace(-1, 1, 32))
    return prunable


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every family, multi-head and grouped, its layers of different sizes or emptied: in memory and on the disk."""
    root = tmp_path_factory.mktemp("saved")
    models = {}
    for family, grouped in VARIANTS:
        models[f"{family}-{'gqa' if grouped else 'mha'}-emptied"] = pruned(family, EMPTIED, grouped_query=grouped)
    for family in DISTINCT_FAMILIES:
        models[f"{family}-gqa-several"] = pruned(family, SEVERAL)
        models[f"{family}-affine"] = pruned(family, UNEVEN, biases=True)
        models[f"{family}-affine-emptied"] = pruned(family, EMPTIED, biases=True)
    for family in EXPERT_FAMILIES:  # in bfloat16, where each way to compute experts rounds in its own
        models[f"{family}-experts"] = prunable = PrunableModel(tiny_model(family, dtype=torch.bfloat16))
        prunable.cut([max(1, sublayer.units - 1 - sublayer.layer) for sublayer in prunable.sublayers])
    for name, prunable in models.items():
        model = prunable.model
        save_pruned(prunable, None, root / "models" / name)
        with torch.no_grad():
            content = {
                "ids": IDS,
                "logits": model(IDS).logits,
                "tokens": model.generate(IDS, max_new_tokens=4, do_sample=False),
            }
        save_file(content, root / f"{name}.safetensors")
    return SimpleNamespace(root=root, names=list(models), models={name: each.model for name, each in models.items()})


def load(saved, name, **options):
    return AutoModelForCausalLM.from_pretrained(saved.root / "models" / name, **options)


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        used = [(f, g) for f, g in VARIANTS if f in (*DISTINCT_FAMILIES, "gemma3_text")]
        names = [f"{f}-{'gqa' if g else 'mha'}-emptied" for f, g in used]
        names += [f"{family}-gqa-several" for family in DISTINCT_FAMILIES]
        metafunc.parametrize("variant", [*names, "llama-affine", "qwen3-affine-emptied"])


class TestLoading:
    def test_every_saved_model_is_bit_equal_and_generates_the_same_without_ffgym(self, saved):
        found = fresh(CHECK, saved.root / "models", hub=saved.root / "hub")
        assert sorted(found) == sorted(saved.names)
        for name, result in found.items():
            assert result == {
                "bit_equal": True,
                "bit_equal_without_head": True,
                "left_over": [],
                "same_tokens": True,
                "tied": saved.models[name].config.tie_word_embeddings,
            }, name

    def test_every_saved_model_is_bit_equal_in_the_class_that_ffgym_registers(self, saved):
        for name in saved.names:
            model, base = load(saved, name), AutoModel.from_pretrained(saved.root / "models" / name)
            assert type(model).__module__.startswith("ffgym.")
            assert type(base).__module__.startswith("ffgym.")
            with torch.no_grad():
                assert torch.equal(model(IDS).logits, saved.models[name](IDS).logits), name
                assert torch.equal(base(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state), name
            model.config.validate_rope()  # vLLM calls it; Phi-3's divides by the number of heads
            linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
            assert all(linear.weight.numel() for linear in linears), name  # vLLM divides by the number of channels

    def test_the_load_line_is_python_that_loads_it(self, saved):
        scope = {}
        exec(load_line(saved.root / "models" / "llama-gqa-emptied"), scope)
        with torch.no_grad():
            assert torch.equal(scope["model"](IDS).logits, saved.models["llama-gqa-emptied"](IDS).logits)


def with_cache(model, cache):
    """The argument that this version of transformers takes a KV cache by."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


class TestGeneration:
    def test_logits_agree_at_every_step_with_and_without_a_cache(self, saved, variant):
        model = load(saved, variant)
        with torch.no_grad():
            whole = model(IDS).logits
            cache = DynamicCache(config=model.config)
            steps = [model(IDS[:, :4], **with_cache(model, cache)).logits]
            steps += [model(IDS[:, i : i + 1], **with_cache(model, cache)).logits for i in range(4, IDS.shape[1])]
        assert cache.get_seq_length() == IDS.shape[1]
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)

    def test_padding_on_either_side_moves_no_logit(self, saved, variant):
        model = load(saved, variant)
        short, pad = IDS[:1, :5], torch.zeros(1, 7, dtype=torch.long)
        with torch.no_grad():
            expected = model(short).logits[0], model(IDS[1:]).logits[0]
            for row in (torch.cat([pad, short], 1), torch.cat([short, pad], 1)):
                mask = torch.cat([row != 0, torch.ones(1, 12, dtype=torch.bool)]).long()
                padded = model(torch.cat([row, IDS[1:]]), attention_mask=mask).logits
                torch.testing.assert_close(padded[0][mask[0] == 1], expected[0], atol=1e-5, rtol=0)
                torch.testing.assert_close(padded[1], expected[1], atol=1e-5, rtol=0)

    def test_a_static_cache_and_beams_work(self, saved, variant):
        model = load(saved, variant)
        options = {"max_new_tokens": 4, "do_sample": False}
        dynamic = model.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, cache_implementation="static", **options), dynamic)
        assert model.generate(IDS, num_beams=3, **options).shape[0] == 2
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(IDS, **with_cache(model, cache))
        assert all(layer.is_initialized for layer in cache.layers)

    @pytest.mark.parametrize(
        "config",
        [
            FFGymQwen2Config(use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=4,
                             hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                             vocab_size=128, per_layer_config={1: {"skip": ["attention"]}}),
            FFGymMistralConfig(sliding_window=4, num_hidden_layers=4, hidden_size=32, num_attention_heads=4,
                               num_key_value_heads=2, intermediate_size=48, vocab_size=128,
                               per_layer_config={1: {"skip": ["attention"]}}),
        ],
        ids=lambda config: config.model_type,
    )  # fmt: skip
    def test_sliding_windows_survive_a_skipped_attention(self, config):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            whole = model(IDS).logits
            cache = DynamicCache(config=model.config)
            steps = [model(IDS[:, i : i + 1], **with_cache(model, cache)).logits for i in range(IDS.shape[1])]
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)

    def test_attention_implementations_can_be_chosen(self, saved):
        eager = load(saved, "qwen3-gqa-emptied", attn_implementation="eager")
        assert eager.model.layers[0].self_attn.config._attn_implementation == "eager"
        with torch.no_grad():
            output = eager(IDS, output_attentions=True)
            sdpa = load(saved, "qwen3-gqa-emptied")(IDS).logits
        assert output.attentions[0].shape == (2, 2, 12, 12)
        torch.testing.assert_close(output.logits, sdpa, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("family", ["llama", "phi3"])  # an attention of Phi-3 has a config of its own
    def test_attention_implementations_can_be_changed_later(self, saved, family):
        model = load(saved, f"{family}-gqa-emptied", attn_implementation="eager")
        with torch.no_grad():
            eager = model(IDS).logits
            for part in (model, model.base_model):
                part.set_attn_implementation("sdpa")
                torch.testing.assert_close(model(IDS).logits, eager, atol=1e-4, rtol=0)
                part.set_attn_implementation("eager")
                assert torch.equal(model(IDS).logits, eager)

    def test_rotary_embeddings_that_depend_on_the_head_count_work(self, tmp_path):
        config = LlamaConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=8, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        )  # fmt: skip
        prunable = PrunableModel(AutoModelForCausalLM.from_config(config).eval())
        prunable.cut((4, 48, 2, 48))
        save_pruned(prunable, None, tmp_path / "m")
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(IDS).logits
            assert torch.equal(loaded, prunable.model(IDS).logits)


class TestUse:
    def test_gradient_checkpointing_gives_the_same_gradients(self, saved, variant):
        def gradients(checkpointing):
            model = load(saved, variant).train()
            if checkpointing:
                model.activation_checkpointing_enable()
            model(IDS, labels=IDS, use_cache=False).loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.numel()}

        plain, checkpointed = gradients(False), gradients(True)
        assert plain.keys() == checkpointed.keys()
        assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)

    @pytest.mark.parametrize("family", DISTINCT_FAMILIES)
    def test_another_precision_and_a_device_map(self, saved, family):
        name = f"{family}-gqa-emptied"
        model = load(saved, name, dtype=torch.bfloat16, device_map="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            logits = model(IDS.to(model.device)).logits.float().cpu()
        assert (logits - saved.models[name](IDS).logits).abs().max() < 0.5
        assert model.generate(IDS.to(model.device), max_new_tokens=2).shape == (2, 14)

    def test_a_model_that_works_in_float32_can_be_saved_in_bfloat16(self, tmp_path):
        prunable = pruned("llama", EMPTIED, biases=True)
        before = {name: weight.clone() for name, weight in prunable.model.state_dict().items()}
        save_pruned(prunable, None, tmp_path / "wide")
        save_pruned(prunable, None, tmp_path / "m", dtype=torch.bfloat16)
        wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "m"))
        assert narrow.keys() == wide.keys()
        assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
        now = prunable.model.state_dict()
        assert all(torch.equal(now[name], weight) for name, weight in before.items()), (
            "the model in memory is as it was"
        )

    def test_a_pipeline_writes_what_the_model_writes_one_by_one_and_in_batches(self, tmp_path, word_tokenizer):
        prunable = pruned("llama", EMPTIED)
        save_pruned(prunable, word_tokenizer, tmp_path / "m")
        write = pipeline("text-generation", model=str(tmp_path / "m"), device="cpu")
        prompts = ["w1 w2 w3 w4 w5", "w7 w8"]
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        expected = []
        for prompt in prompts:
            ids = word_tokenizer(prompt, return_tensors="pt").input_ids
            new = prunable.model.generate(ids, **options)[0, ids.shape[1] :]
            expected.append(prompt + word_tokenizer.decode(new, skip_special_tokens=True))
        assert [write(prompt, **options)[0]["generated_text"] for prompt in prompts] == expected
        assert [row[0]["generated_text"] for row in write(prompts, batch_size=2, **options)] == expected


class TestOnDisk:
    def test_it_is_smaller_by_what_the_parameters_say(self, tmp_path):
        for family, dtype in (("llama", torch.float32), ("opt", torch.bfloat16)):
            dense = tiny_model(family, dtype=dtype)
            dense.save_pretrained(tmp_path / family / "dense")
            dense_bytes = (tmp_path / family / "dense" / "model.safetensors").stat().st_size
            dense_parameters = dense.num_parameters()
            prunable = PrunableModel(dense)
            prunable.cut(UNEVEN)
            written = save_pruned(prunable, None, tmp_path / family / "p")
            removed = sum(s.unit_params * (s.units - k) for s, k in zip(prunable.sublayers, UNEVEN, strict=True))
            assert isinstance(written, SavedModel)
            assert written.parameters == dense_parameters - removed
            assert written.bytes == (written.path / "model.safetensors").stat().st_size
            header = 64  # the headers list the same tensors, with shorter numbers
            assert abs(dense_bytes - written.bytes - removed * dtype.itemsize) <= header

    def test_a_view_is_written_without_what_lies_behind_it(self, tmp_path):
        prunable = pruned("llama", UNEVEN)
        model = prunable.model
        arena = torch.zeros(1_000_000)
        start = 0
        for weight in model.parameters():  # every weight a window of one storage
            window = arena[start : start + weight.numel()].view(weight.shape)
            window.copy_(weight.detach())
            weight.data = window
            start += weight.numel()
        written = save_pruned(prunable, None, tmp_path / "m")
        assert written.bytes < 4 * written.parameters + 4096
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    def test_tied_embeddings_are_written_once(self, saved):
        for family, tied in (("gemma", True), ("gemma3_text", True), ("opt", True), ("llama", False)):
            names = load_file(saved.root / "models" / f"{family}-gqa-emptied" / "model.safetensors").keys()
            assert ("lm_head.weight" in names) is not tied

    @pytest.mark.parametrize("stock", [False, True])
    def test_an_output_matrix_that_only_the_config_calls_tied_is_kept(self, tmp_path, stock):
        """transformers uses both matrices where a checkpoint holds both and they differ."""
        tiny_model("llama").save_pretrained(tmp_path / "dense")
        config = json.loads((tmp_path / "dense" / "config.json").read_text())
        (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        prunable = PrunableModel(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
        prunable.cut((2, 20) * 3)
        save_pruned(prunable, None, tmp_path / "m", stock=stock)
        with torch.no_grad():
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
            assert torch.equal(loaded(IDS).logits, prunable.model(IDS).logits)

    def test_the_config_says_what_each_layer_is(self, saved):
        config = json.loads((saved.root / "models" / "llama-gqa-emptied" / "config.json").read_text())
        assert config["model_type"] == "ffgym_llama"
        assert config["head_dim"] == 8
        several = json.loads((saved.root / "models" / "llama-gqa-several" / "config.json").read_text())
        one = {"num_attention_heads": 1, "num_key_value_heads": 1}
        assert several["per_layer_config"]["1"] == {"skip": ["attention", "mlp"]} | one
        assert config["per_layer_config"] == {
            "0": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 17},
            "1": {"skip": ["attention"]} | one,
            "2": {"skip": ["mlp"]},
        }
        for name in ("qwen2-gqa-emptied", "opt-gqa-emptied"):
            assert AutoConfig.from_pretrained(saved.root / "models" / name).head_dim == 8

    def test_servers_find_what_they_multiply_logits_by(self, saved):
        assert load(saved, "granite-gqa-emptied").config.logit_scale == 1 / 2.0


class TestRefusals:
    @pytest.fixture
    def prunable(self):
        return pruned("llama", UNEVEN)

    def test_an_occupied_folder_is_refused_and_untouched(self, prunable, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match="not empty") as raised:
            save_pruned(prunable, None, tmp_path)
        assert "--overwrite" in raised.value.hint
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_overwrite_replaces_a_checkpoint_whole(self, prunable, tmp_path):
        save_pruned(prunable, None, tmp_path / "m")
        (tmp_path / "m" / "model-00001-of-00002.safetensors").write_text("stale")
        save_pruned(prunable, None, tmp_path / "m", overwrite=True, card="new")
        assert (tmp_path / "m" / "README.md").read_text() == "new"
        assert not (tmp_path / "m" / "model-00001-of-00002.safetensors").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    @pytest.mark.parametrize("name", ["mine.gguf", "notes.txt", "adapter_model.safetensors", "figures.json"])
    def test_overwrite_never_deletes_what_somebody_put_beside_a_model(self, prunable, tmp_path, name):
        save_pruned(prunable, byte_level(), tmp_path)
        (tmp_path / name).write_text("mine")
        with pytest.raises(OutputError, match=f"holds {re.escape(name)}"):
            save_pruned(prunable, byte_level(), tmp_path, overwrite=True)
        assert (tmp_path / name).read_text() == "mine"

    @pytest.mark.parametrize("umask", [0o022, 0o077])
    def test_files_get_the_mode_that_the_umask_gives(self, prunable, tmp_path, umask):
        before = os.umask(umask)
        try:
            save_pruned(prunable, None, tmp_path / "m", max_shard_size="20KB")
        finally:
            os.umask(before)
        files = list((tmp_path / "m").iterdir())
        assert len([file for file in files if file.suffix == ".safetensors"]) > 1
        assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}

    def test_overwrite_never_deletes_what_is_no_checkpoint(self, prunable, tmp_path):
        """Such as a project that has a config.json."""
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(OutputError, match="holds no model"):
            save_pruned(prunable, None, tmp_path, overwrite=True)
        (tmp_path / "model.safetensors").write_text("")
        (tmp_path / "src").mkdir()
        with pytest.raises(OutputError, match="holds src/"):
            save_pruned(prunable, None, tmp_path, overwrite=True)
        assert (tmp_path / "src").is_dir()

    def test_a_saved_model_whose_tokenizer_has_a_folder_of_its_own_is_replaced(self, prunable, tmp_path):
        tokenizer = byte_level()
        tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
        for card in ("old", "new"):
            save_pruned(prunable, tokenizer, tmp_path / "m", overwrite=True, card=card)
            assert (tmp_path / "m" / "additional_chat_templates" / "tools.jinja").is_file()
        assert (tmp_path / "m" / "README.md").read_text() == "new"

    def test_an_empty_folder_and_missing_parents_are_fine(self, prunable, tmp_path):
        (tmp_path / "empty").mkdir()
        assert save_pruned(prunable, None, tmp_path / "empty").path == tmp_path / "empty"
        assert save_pruned(prunable, None, tmp_path / "a" / "b").path.is_dir()

    def test_a_file_in_the_way_is_refused(self, prunable, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="is a file"):
            save_pruned(prunable, None, tmp_path / "file")
        with pytest.raises(OutputError, match="cannot write"):
            save_pruned(prunable, None, tmp_path / "file" / "m")

    def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(self, prunable, tmp_path, small_files):
        save_pruned(prunable, None, tmp_path / "m", card="old")
        with pytest.raises(OutputError, match="cannot write"), small_files(40_000):  # the weights do not fit
            save_pruned(prunable, None, tmp_path / "m", overwrite=True, card="new")
        assert (tmp_path / "m" / "README.md").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["m"]

    def test_an_interruption_leaves_nothing_behind(self, prunable, tmp_path):
        class Interrupting:
            def save_pretrained(self, folder):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            save_pruned(prunable, Interrupting(), tmp_path / "m")
        assert list(tmp_path.iterdir()) == []

    def test_a_generation_config_that_was_made_invalid_is_refused_by_name(self, prunable, tmp_path):
        prunable.model.generation_config.temperature = 0.6  # without do_sample
        with pytest.raises(ModelError, match=r"cannot be saved: GenerationConfig is invalid: .*temperature") as raised:
            save_pruned(prunable, None, tmp_path / "m")
        assert "generation_config" in raised.value.hint
        assert list(tmp_path.iterdir()) == []

    def test_a_generation_config_that_was_published_so_is_saved_again(self, tmp_path):
        published = {"do_sample": False, "temperature": 0.6}
        tiny_model("llama").save_pretrained(tmp_path / "dense")
        byte_level().save_pretrained(tmp_path / "dense")
        (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(published))
        prunable = PrunableModel(load_model(str(tmp_path / "dense"), dtype="float32", device="cpu").model)
        prunable.cut(UNEVEN)
        save_pruned(prunable, None, tmp_path / "m")
        assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["temperature"] == 0.6

    def test_the_attention_of_layer_0_cannot_be_skipped(self, tmp_path):
        with pytest.raises(ModelError, match="layer 0"):
            save_pruned(pruned("llama", (0, *UNEVEN[1:])), None, tmp_path / "m")


class TestClasses:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"num_attention_heads": 3, "num_key_value_heads": 2}, "layer 1: 3 query heads cannot share 2"),
            ({"num_attention_heads": 0}, "layer 1: 0 query heads"),
            ({"skip": ["everything"]}, "layer 1: unknown sublayer"),
            ({"consumer_bias": ["norm"]}, "layer 1: unknown sublayer"),
        ],
    )
    def test_sizes_that_do_not_fit_together_are_refused(self, sizes, message):
        dense = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        with pytest.raises(ValueError, match=message):
            FFGymLlamaConfig(**dense, vocab_size=128, per_layer_config={1: sizes})

    def test_its_config_has_defaults(self):
        """Before, vLLM could not load a Nemotron: to print a config, transformers makes another one of defaults."""
        assert all(family_of_type(family).saved_classes()[0]() for family in TINY_FAMILIES)

    @pytest.mark.parametrize("family", TINY_FAMILIES)
    def test_without_per_layer_config_it_is_the_stock_model(self, family):
        stock = tiny_model(family)
        config_class, model_class, _ = family_of_type(family).saved_classes()
        settings = {k: v for k, v in stock.config.to_dict().items() if k != "model_type"}
        model = model_class(config_class(**settings)).eval()
        model.load_state_dict(stock.state_dict())
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, stock(IDS).logits)


class TestRefresh:
    @pytest.fixture
    def old(self, saved, tmp_path):
        """A model as it was saved before there was a class without a head."""
        name = next(name for name in saved.names if name.startswith("llama"))
        folder = tmp_path / "run" / "model"
        shutil.copytree(saved.root / "models" / name, folder)
        config = json.loads((folder / "config.json").read_text())
        del config["auto_map"]["AutoModel"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_ffgym.py").write_text("raise ImportError('old')\n")
        return folder

    def test_old_checkpoints_get_todays_class_file_and_keep_their_weights(self, saved, old):
        name = next(name for name in saved.names if name.startswith("llama"))
        weights = (old / "model.safetensors").read_bytes()
        written = refresh(old.parent)  # the run's folder will do
        assert written == [old / "config.json", old / "modeling_ffgym.py"]
        assert (old / "model.safetensors").read_bytes() == weights
        for path in written:
            assert path.read_text() == (saved.root / "models" / name / path.name).read_text()
        assert refresh(old) == [], "all is of today by now"

    @pytest.mark.usefixtures("read_only_disk")
    def test_a_folder_that_may_not_be_written_to_has_to_be_copied(self, old):
        with pytest.raises(OutputError, match="Read-only file system") as raised:
            refresh(old)
        assert raised.value.hint == "You may not write there: copy the folder to a place that you may write to."

    def test_a_stock_model_has_nothing_to_refresh(self, tmp_path):
        tiny_model("llama").save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="stock architecture 'llama'"):
            refresh(tmp_path)

    def test_a_config_that_does_not_load_is_refused_and_stays(self, old):
        text = (old / "config.json").read_text().replace('"hidden_act": "silu"', '"hidden_act": 3')
        (old / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"files are damaged or incomplete: .*hidden_act"):
            refresh(old)
        assert (old / "config.json").read_text() == text

    def test_a_text_config_in_a_model_of_one_tower_is_refused(self, old):
        config = json.loads((old / "config.json").read_text())
        (old / "config.json").write_text(json.dumps({**config, "text_config": {"model_type": "llama"}}))
        with pytest.raises(ModelError, match="files are damaged or incomplete"):
            load_model(str(old), dtype="float32", device="cpu")

    def test_a_model_whose_family_is_not_installed_is_refused_by_name(self, old):
        text = (old / "config.json").read_text()
        (old / "config.json").write_text(text.replace('"ffgym_llama"', '"ffgym_newcomer"'))
        for use in (refresh, lambda folder: load_model(str(folder))):
            with pytest.raises(ModelError, match="architecture 'ffgym_newcomer' is not supported"):
                use(old)
