"""Vision-language checkpoints: the text model is pruned like any other, and everything else is saved as it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import fresh
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from ffgym import run
from ffgym.config.tables import RunConfig
from ffgym.errors import ConfigError, ModelError
from ffgym.export.checkpoint import load_line, save_model, save_pruned
from ffgym.export.format import export
from ffgym.export.refresh import is_current
from ffgym.models.checkpoint import check_config
from ffgym.models.cut import PrunableModel
from ffgym.models.families import family_of
from ffgym.models.loading import config_of, load, load_config
from ffgym.models.towers import check_towers
from ffgym.plan.shape import shape_of
from ffgym.prepare.planning import plan_of
from ffgym.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("only_builtins")

IDS = torch.arange(4, 20)[None]
IMAGE = 127  # the token that stands for a piece of an image
KEPT = (1, 17, 2, 48, 1, 0)
SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PIXELS = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
# By type: the family of the text model, further settings, the tokens of an image, and what is given beside them.
TOWERS: dict[str, tuple[str, dict[str, Any], int, dict[str, torch.Tensor]]] = {
    "gemma3": (
        "gemma3_text",
        {"vision_config": SIGHT, "mm_tokens_per_image": 4, "image_token_index": IMAGE},
        4,
        {"pixel_values": PIXELS},
    ),
    "llava": (
        "llama",
        {
            "vision_config": {"model_type": "clip_vision_model", **SIGHT},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        4,
        {"pixel_values": PIXELS},
    ),
    "mistral3": (
        "mistral",
        {
            "vision_config": {"model_type": "pixtral", **SIGHT, "head_dim": 8},
            "image_token_index": IMAGE,
            "spatial_merge_size": 1,
            "vision_feature_layer": -1,
        },
        4,
        {"pixel_values": PIXELS, "image_sizes": torch.tensor([[28, 28]])},
    ),
    "smolvlm": (
        "llama",
        {"vision_config": SIGHT, "image_token_id": IMAGE, "scale_factor": 1},
        4,
        {"pixel_values": PIXELS[None]},
    ),
    "internvl": (
        "qwen2",
        {
            "vision_config": {**SIGHT, "image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        },
        1,
        {"pixel_values": PIXELS},
    ),
}

# Runs in a fresh process that cannot import ffgym.
CHECK = """
import json, pathlib, sys
sys.modules["ffgym"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText
found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    options = {} if folder.name.startswith("stock") else {"trust_remote_code": True}
    expected = load_file(folder.parent.parent / f"{folder.name}.safetensors")
    text, seen, tokens = (expected.pop(name) for name in ("text", "seen", "tokens"))
    ids = expected.pop("ids")
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    base, others = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    left = [name for each in (report, others) for names in each.values() for name in names]
    with torch.no_grad():
        found[folder.name] = {
            "text": torch.equal(model(input_ids=ids).logits, text),
            # Some processors' convolutions depend on where in memory an image lies.
            "image and text": torch.allclose(model(**expected).logits, seen, rtol=0, atol=1e-5),
            "tokens": torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens),
            "nothing left over": not [name for name in left if not name.endswith("lm_head.weight")],
        }
print(json.dumps(found))
"""


def whole_model(kind: str, family: str = "", **changes: Any) -> Any:
    """A small random model of several towers."""
    own, settings, _, _ = TOWERS[kind]
    text = tiny_model(family or own).config.to_dict()
    config = CONFIG_MAPPING[kind](
        text_config=text, **{**settings, "tie_word_embeddings": text["tie_word_embeddings"], **changes}
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def saved_whole(folder: Path, tokenizer: Any, kind: str, **changes: Any) -> str:
    """Such a model as its authors save it, with its tokenizer and a file of its processor."""
    whole_model(kind, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    return str(folder)


def opened(name: str) -> Any:
    return load(name, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any) -> SimpleNamespace:
    """Each of them with its text model cut, in memory and on the disk; ``stock-llava`` has one shape for all layers."""
    root = tmp_path_factory.mktemp("towers")
    loaded: dict[str, Any] = {}
    for name in (*TOWERS, "stock-llava"):
        kind = name.removeprefix("stock-")
        one = loaded[name] = opened(saved_whole(root / "dense" / name, word_tokenizer, kind))
        _, _, count, others = TOWERS[kind]
        prunable = PrunableModel(one.model)
        prunable.cut((1, 17) * 3 if name != kind else KEPT)
        save_pruned(
            prunable,
            one.tokenizer,
            root / "models" / name,
            stock=name != kind,
            towers=one.towers,
        )
        seen = {"input_ids": torch.cat([torch.full((1, count), IMAGE), IDS], dim=1), **others}
        if kind == "gemma3":
            seen["token_type_ids"] = (seen["input_ids"] == IMAGE).long()
        with torch.no_grad():
            content = {
                "ids": IDS,
                "text": one.model(IDS).logits,
                "tokens": one.model.generate(IDS, max_new_tokens=4, do_sample=False),
                "seen": one.towers.whole(**seen).logits,
            }
        save_file(content | seen, root / f"{name}.safetensors")
    return SimpleNamespace(root=root, loaded=loaded)


def tensors(saved: SimpleNamespace, name: str) -> dict[str, torch.Tensor]:
    return load_file(saved.root / "models" / name / "model.safetensors")


def test_dense_text_has_the_logits_of_the_whole(tmp_path: Path, word_tokenizer: Any) -> None:
    for kind in TOWERS:
        one = opened(saved_whole(tmp_path / kind, word_tokenizer, kind))
        with torch.no_grad():
            assert torch.equal(one.model(IDS).logits, one.towers.whole(input_ids=IDS).logits), kind
        assert one.model.get_input_embeddings() is one.towers.whole.get_input_embeddings(), "nothing is copied"


@pytest.mark.slow
def test_a_fresh_process_without_ffgym_has_the_same_logits_and_tokens(saved: SimpleNamespace) -> None:
    found = fresh(CHECK, saved.root / "models", hub=saved.root / "hub")
    assert {name: all(each.values()) for name, each in found.items()} == dict.fromkeys(saved.loaded, True), found


@pytest.mark.parametrize("kind", TOWERS)
def test_the_rest_is_saved_bit_for_bit_under_its_own_names(saved: SimpleNamespace, kind: str) -> None:
    written, dense = tensors(saved, kind), whole_model(kind)
    names = dense.state_dict()
    path = saved.loaded[kind].towers.path
    rest = {name for name in names if not name.startswith(path) and name != "lm_head.weight"}
    assert rest
    assert all(torch.equal(written[name], names[name]) for name in rest)
    assert set(written) <= set(names), "an emptied sublayer is gone, and nothing has another name"
    assert (saved.root / "models" / kind / "preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'


def test_ffgym_opens_the_text_model_again(saved: SimpleNamespace, tmp_path: Path) -> None:
    folder = saved.root / "models" / "gemma3"
    again = opened(str(folder))
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, saved.loaded["gemma3"].model(IDS).logits)
    assert is_current(folder)
    with pytest.raises(ModelError, match="already pruned by ffgym"):
        family_of(again.model)
    # As recovery saves it, after training.
    save_model(again.model, again.tokenizer, tmp_path / "trained", card="", towers=again.towers)
    trained, before = load_file(tmp_path / "trained" / "model.safetensors"), tensors(saved, "gemma3")
    assert trained.keys() == before.keys()
    assert all(torch.equal(trained[name], before[name]) for name in before)
    assert (tmp_path / "trained" / "preprocessor_config.json").is_file()


def test_the_load_line_is_python_that_loads_the_whole(saved: SimpleNamespace) -> None:
    scope: dict[str, Any] = {}
    exec(load_line(saved.root / "models" / "stock-llava"), scope)
    assert type(scope["model"]) is LlavaForConditionalGeneration


def test_a_pruned_text_model_is_saved_by_itself_as_the_docs_say(saved: SimpleNamespace, tmp_path: Path) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(saved.root / "models" / "llava", trust_remote_code=True)
    language = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=whole.dtype)
    language.model, language.lm_head = whole.model.language_model, whole.lm_head
    language.save_pretrained(tmp_path)
    saved.loaded["llava"].tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(opened(str(tmp_path)).model(IDS).logits, saved.loaded["llava"].model(IDS).logits)


def test_the_whole_is_saved_no_wider_than_its_checkpoint(tmp_path: Path, word_tokenizer: Any) -> None:
    name = saved_whole(tmp_path / "dense", word_tokenizer, "smolvlm")
    file = tmp_path / "dense" / "config.json"
    content = json.loads(file.read_text())
    content["text_config"].pop("dtype", None)  # as older checkpoints have it: only the whole says
    file.write_text(json.dumps({**content, "dtype": "bfloat16"}))
    one = opened(name)
    assert one.saved_dtype == torch.bfloat16
    assert shape_of(config_of(name), name).saved_as == "bfloat16"
    prunable = PrunableModel(one.model)
    prunable.cut(KEPT)
    save_pruned(prunable, one.tokenizer, tmp_path / "model", towers=one.towers, dtype=one.saved_dtype)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in one.towers.whole.parameters()} == {torch.float32}, "in memory"


def test_the_text_model_alone_is_planned(tmp_path: Path, word_tokenizer: Any) -> None:
    name = saved_whole(tmp_path, word_tokenizer, "smolvlm")
    shape = shape_of(config_of(name), name)
    assert shape.family == "llama"
    assert shape.parameters == sum(p.numel() for p in tiny_model("llama").parameters())


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"model_type": "voxtral", "text_config": {"model_type": "llama"}}, "no image-text-to-text model", "by itself"),
        ({"model_type": "blip-2", "text_config": {"model_type": "opt"}}, "'blip-2'.*cannot be saved", "by itself"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_from_its_config(config: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        check_towers(config)
    assert hint in raised.value.hint


def test_a_text_config_that_is_no_table_is_refused() -> None:
    with pytest.raises(ModelError, match="text_config = 5 is no JSON object"):
        check_config("damaged", {"model_type": "llava", "text_config": 5}, any_family=False, depth=3)


def test_code_that_builds_its_text_model_from_no_config_is_refused() -> None:
    class FixedConfig(LlavaConfig):  # type: ignore[misc]
        model_type = "fixed"

    class Fixed(LlavaForConditionalGeneration):  # type: ignore[misc]
        config_class = FixedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.language_model = LlamaModel(config.text_config)

    AutoConfig.register("fixed", FixedConfig, exist_ok=True)
    AutoModelForImageTextToText.register(FixedConfig, Fixed, exist_ok=True)
    AutoModel.register(FixedConfig, Fixed, exist_ok=True)
    with pytest.raises(ModelError, match=r"'fixed'.*its code does not build the one for text"):
        check_towers({**whole_model("llava").config.to_dict(), "model_type": "fixed"})


def test_a_whole_that_computes_something_else_from_text_is_refused(tmp_path: Path, word_tokenizer: Any) -> None:
    """Granite divides its logits, and LLaVA's code does not."""
    name = saved_whole(tmp_path, word_tokenizer, "llava", family="granite")
    with pytest.raises(ModelError, match=r"LlavaForConditionalGeneration, computes other logits .* GraniteForCausalLM"):
        opened(name)


def test_layers_are_not_streamed(tmp_path: Path, word_tokenizer: Any) -> None:
    name = saved_whole(tmp_path, word_tokenizer, "llava")
    with pytest.raises(ModelError, match=r"several towers.*neither be streamed") as raised:
        load(name, device="cpu", streamed=True)
    assert "model.placement resident" in raised.value.hint


def test_a_plan_does_not_stream_them_either(tmp_path: Path, word_tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("FFGYM_CACHE_SIZE", "1GB")
    name = saved_whole(tmp_path, word_tokenizer, "smolvlm")
    with pytest.raises(ConfigError, match="several towers"):
        plan_of(
            RunConfig.model_validate(
                {"model": {"name": name, "device": "cpu", "placement": "stream"}, "data": {"window": 64}}
            )
        )


def test_formats_and_servers_of_language_models_are_refused(saved: SimpleNamespace, tmp_path: Path) -> None:
    folder = saved.root / "models" / "llava"
    for name in ("gguf", "nemotron-nas"):
        with pytest.raises(ModelError, match="'ffgym_llava', has several towers") as raised:
            export(folder, tmp_path / "out.gguf", name=name)
        assert "by itself" in raised.value.hint
    with pytest.raises(ModelError, match="several towers"):
        load_config(folder)
    assert not list(tmp_path.iterdir())


def test_a_run_prunes_saves_and_says_how_to_load_it(
    tmp_path: Path, tiny_run: dict[str, Any], word_tokenizer: Any
) -> None:
    name = saved_whole(tmp_path / "dense", word_tokenizer, "llava")
    tables: dict[str, Any] = {
        **tiny_run,
        "model": {**tiny_run["model"], "name": name},
        "search": {**tiny_run["search"], "episodes": 4, "episodes_per_update": 2, "random_baseline": False},
        "output": {"dir": str(tmp_path / "run")},
        "tracking": {"enabled": False},
    }
    result = run(RunConfig.model_validate(tables))
    assert result.saved is not None
    card = (result.saved.path / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)" in card
    assert "AutoModelForImageTextToText" in load_line(result.saved.path)
    parts = {key: value for key, value in whole_model("llava").state_dict().items() if "language_model" not in key}
    written = load_file(result.saved.path / "model.safetensors")
    assert all(torch.equal(written[key], value) for key, value in parts.items())
    assert isinstance(opened(str(result.saved.path)).model, nn.Module)
