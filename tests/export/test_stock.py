"""A model whose layers all have one shape is a stock checkpoint: transformers alone loads it, to the same bits."""

from __future__ import annotations

import json

import pytest
import torch
from distinct_families import DISTINCT_FAMILIES
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ffgym.costs.resource import standard_costs
from ffgym.costs.size import SizeMeter
from ffgym.criteria.wanda import Wanda
from ffgym.errors import ModelError
from ffgym.export.checkpoint import load_line, save_pruned, stock_model
from ffgym.models.built_in_families import Llama
from ffgym.models.cut import PrunableModel
from ffgym.models.families import Stock, family_of, family_of_type
from ffgym.models.sublayer import parameter
from ffgym.prepare.paths import prepare
from ffgym.testing.models import TINY_FAMILIES, tiny_model

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(7))


def cut(family, shape, *, grouped_query=True, biases=False):
    """A tiny model whose three layers keep one shape; with biases on all consumers if asked for."""
    prunable = PrunableModel(tiny_model(family, grouped_query=grouped_query))
    prunable.cut(shape * 3)
    if biases:
        for half in prunable.halves:
            half.consumer.bias = parameter(torch.linspace(-1, 1, 32))
    return prunable


def save(prunable, folder, **options):
    return save_pruned(prunable, None, folder, stock=True, **options)


def variant(family, grouped):
    """A stock shape with fewer heads than the dense model's, where the family takes one, and fewer channels."""
    model = tiny_model(family, grouped_query=grouped)
    return family, (family_of(model).stock_shapes(model)["attention"][-2:][0], 17), grouped


VARIANTS = {
    f"{family}-{'gqa' if grouped else 'mha'}": variant(family, grouped)
    for family in TINY_FAMILIES
    for grouped in (True, False)
    if (family_of_type(family).kv_heads if grouped else family in DISTINCT_FAMILIES)
} | {
    "llama-mlp": ("llama", (2, 16), True),
    "llama-affine": ("llama", (1, 17), True),
    "opt-affine": ("opt", (4, 17), False),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every family on the disk, beside what it computes in memory."""
    root = tmp_path_factory.mktemp("stock")
    for name, (family, shape, grouped) in VARIANTS.items():
        prunable = cut(family, shape, grouped_query=grouped, biases=name.endswith("affine"))
        save(prunable, root / "models" / name)
        with torch.no_grad():
            content = {
                "logits": prunable.model(IDS).logits,
                "tokens": prunable.model.generate(IDS, max_new_tokens=4, do_sample=False),
            }
        save_file(content, root / f"{name}.safetensors")
    return root


def load_stock(saved, name):
    return AutoModelForCausalLM.from_pretrained(saved / "models" / name)


def config_of(saved, name):
    return json.loads((saved / "models" / name / "config.json").read_text())


class TestLoading:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_a_stock_checkpoint_is_bit_equal_in_transformers_own_class_and_can_be_pruned_again(self, saved, name):
        family, (groups, channels), _ = VARIANTS[name]
        files, config = {path.name for path in (saved / "models" / name).iterdir()}, config_of(saved, name)
        assert files == {"config.json", "generation_config.json", "model.safetensors"}
        assert config["model_type"] == family
        assert config["architectures"] == [type(tiny_model(family)).__name__]
        assert not {"auto_map", "per_layer_config", "consumer_bias"} & set(config)
        model, expected = load_stock(saved, name), load_file(saved / f"{name}.safetensors")
        assert type(model) is type(tiny_model(family))
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected["logits"])
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected["tokens"])
        prunable = PrunableModel(model)
        assert prunable.dense_units == (groups, channels) * 3
        assert {sublayer.head_dim for sublayer in prunable.sublayers[::2]} == {8}
        assert family_of(model).stock_shapes(model)["mlp"] == tuple(range(1, channels + 1))

    def test_the_load_line_asks_for_no_trust(self, saved):
        scope = {}
        line = load_line(saved / "models" / "llama-gqa")
        assert "trust" not in line
        exec(line, scope)
        with torch.no_grad():
            assert torch.equal(scope["model"](IDS).logits, load_file(saved / "llama-gqa.safetensors")["logits"])


class TestOnDisk:
    def test_the_config_says_the_shape(self, saved):
        sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 17, "head_dim": 8}
        for name in ("llama-gqa", "mistral-gqa", "qwen2-gqa", "qwen3-gqa", "gemma-gqa"):
            assert config_of(saved, name).items() >= sizes.items()
        sizes = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 17, "head_dim": 8}
        for name in ("qwen2-mha", "qwen3-mha"):
            assert config_of(saved, name).items() >= sizes.items()
        assert config_of(saved, "opt-mha").items() >= {"num_attention_heads": 4, "ffn_dim": 17}.items()

    def test_biases_are_switched_on_where_calibration_gave_some_and_zero_elsewhere(self, saved):
        assert config_of(saved, "llama-affine").items() >= {"attention_bias": True, "mlp_bias": True}.items()
        assert config_of(saved, "llama-gqa").items() >= {"attention_bias": False, "mlp_bias": False}.items()
        weights = load_file(saved / "models" / "llama-affine" / "model.safetensors")
        biases = {name.removesuffix(".bias"): value for name, value in weights.items() if name.endswith(".bias")}
        assert len(biases) == 3 * 7
        for name, value in biases.items():
            given = name.endswith(("o_proj", "down_proj"))
            assert torch.equal(value, torch.linspace(-1, 1, 32) if given else torch.zeros_like(value)), name

    def test_only_the_half_that_was_given_biases_is_switched(self, tmp_path):
        prunable = cut("qwen3", (1, 48))
        for half in prunable.halves[::2]:
            half.consumer.bias = parameter(torch.linspace(-1, 1, 32))
        save(prunable, tmp_path / "m")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert loaded.config.attention_bias is True
        assert loaded.model.layers[0].mlp.down_proj.bias is None
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, prunable.model(IDS).logits)

    @pytest.mark.parametrize("name", ["llama-gqa", "llama-affine", "opt-mha"])
    def test_the_size_report_counts_what_is_written(self, tmp_path, name):
        family, shape, grouped = VARIANTS[name]
        dense = PrunableModel(tiny_model(family, grouped_query=grouped))
        meter = SizeMeter(dense, standard_costs(dense.model, context=64))
        prunable = cut(family, shape, grouped_query=grouped, biases=name.endswith("affine"))
        written = save(prunable, tmp_path / "m")
        assert written.parameters == meter(shape * 3, new_biases=prunable.new_bias_params(stock=True))["params"]

    def test_shards_and_half_precision(self, tmp_path):
        """The zeros beside the biases of affine calibration take the model's dtype, too."""
        prunable = PrunableModel(tiny_model("llama", dtype=torch.bfloat16))
        prunable.cut((1, 17) * 3)
        for half in prunable.halves:
            half.consumer.bias = parameter(torch.linspace(-1, 1, 32, dtype=torch.bfloat16))
        shards = list(save(prunable, tmp_path / "m", max_shard_size=20_000).path.glob("*.safetensors"))
        assert len(shards) > 1
        assert {weight.dtype for shard in shards for weight in load_file(shard).values()} == {torch.bfloat16}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, prunable.model(IDS).logits)

    def test_exporting_leaves_the_model_as_it_was(self):
        prunable = cut("llama", (1, 17), biases=True)
        before = prunable.model(IDS).logits
        stock_model(prunable)
        assert torch.equal(prunable.model(IDS).logits, before)
        assert prunable.model.config.num_attention_heads == 4
        assert prunable.model.config.attention_bias is False


def stock_accepts(family, heads, hidden=24, head_dim=8):
    """Whether the stock classes themselves build a working model with this many heads of this width."""
    sizes = {family_of_type(family).intermediate: 16, "num_hidden_layers": 1, "vocab_size": 16}
    kv = {} if family_of_type(family).kv_heads is None else {"num_key_value_heads": heads}
    try:
        config = AutoConfig.for_model(
            family, hidden_size=hidden, num_attention_heads=heads, head_dim=head_dim, pad_token_id=0, **sizes, **kv
        )
        model = AutoModelForCausalLM.from_config(config)
    except (ValueError, StrictDataclassError):
        return False
    consumer = family_of_type(family).consumer(family_of_type(family).layers(model)[0], "attention")
    return consumer.in_features == heads * head_dim and model(torch.arange(4)[None]).logits.shape == (1, 4, 16)


class TestLegalShapes:
    @pytest.mark.parametrize("family", TINY_FAMILIES)
    def test_are_those_that_the_stock_classes_take(self, family):
        """Hidden size 24, heads of 8 channels: a dense OPT has 3 heads."""
        stock, numbers = family_of_type(family).stock, range(1, 14)
        legal = [heads for heads in numbers if stock.takes(heads, dense_heads=3, hidden=24)]
        assert legal == [heads for heads in numbers if stock_accepts(family, heads)]

    @pytest.mark.parametrize(
        ("family", "grouped", "attention"),
        [
            ("llama", True, (1, 2)),
            ("llama", False, (1, 2, 4)),
            ("mistral", False, (1, 2, 3, 4)),
            ("qwen2", True, (1, 2)),
            ("qwen3", False, (1, 2, 3, 4)),
            ("gemma", False, (1, 2, 3, 4)),
            ("opt", False, (4,)),
        ],
    )
    def test_count_kv_groups(self, family, grouped, attention):
        model = tiny_model(family, grouped_query=grouped)
        shapes = family_of(model).stock_shapes(model)
        assert shapes == {"attention": attention, "mlp": tuple(range(1, 49))}

    def test_groups_keep_all_their_query_heads(self):
        """24 hidden channels, 12 query heads in 4 groups: 3, 6 and 12 heads divide them, 9 do not."""
        model = tiny_model("llama")
        model.config = replace_config(model.config, hidden_size=24, num_attention_heads=12, num_key_value_heads=4)
        assert family_of(model).stock_shapes(model)["attention"] == (1, 2, 4)


def replace_config(config, **changes):
    return type(config)(**{**config.to_dict(), **changes})


class TestRefusals:
    def refused(self, prunable, tmp_path, match, **options):
        with pytest.raises(ModelError, match=match) as raised:
            save(prunable, tmp_path / "m", **options)
        assert list(tmp_path.iterdir()) == []
        return raised.value.hint

    def test_layers_of_different_sizes(self, tmp_path):
        prunable = PrunableModel(tiny_model("llama"))
        prunable.cut((1, 17, 2, 17, 1, 17))
        assert "--uniform" in self.refused(prunable, tmp_path, "differ in size")

    @pytest.mark.parametrize(
        ("family", "shape", "match"),
        [
            ("llama", (3, 48), "llama checkpoint cannot keep 3 of 4 units of its attention; it can keep 1, 2, 4"),
            ("opt", (2, 48), "opt checkpoint cannot keep 2 of 4 units of its attention; it can keep 4"),
            ("qwen2", (4, 0), "qwen2 checkpoint cannot keep 0 of 48 units of its mlp; it can keep 1 to 48"),
        ],
    )
    def test_shapes_that_the_family_does_not_take(self, tmp_path, family, shape, match):
        self.refused(cut(family, shape, grouped_query=False), tmp_path, match)

    @pytest.mark.parametrize(
        ("family", "linear"),
        [
            ("mistral", "self_attn.o_proj"),
            ("qwen2", "self_attn.o_proj"),
            ("qwen3", "mlp.down_proj"),
            ("gemma", "mlp.down_proj"),
        ],
    )
    def test_biases_that_the_family_does_not_have(self, tmp_path, family, linear):
        message = f"stock {family} checkpoint has no bias on {linear}"
        assert "--calibration ridge" in self.refused(cut(family, (1, 17), biases=True), tmp_path, message)
        model = tiny_model(family)
        with pytest.raises(ModelError, match=message):
            family_of(model).check_stock_biases(model)

    def test_a_family_whose_stock_shapes_nobody_knows(self):
        class Newcomer(Llama):
            name = "newcomer"
            stock = None

        for ask in (Newcomer().stock_shapes, Newcomer().check_stock_biases):
            with pytest.raises(ModelError, match="stock newcomer checkpoint can have is not known"):
                ask(tiny_model("llama"))
        assert all(family_of_type(name).stock is not None for name in TINY_FAMILIES)

    def test_a_check_of_transformers_that_the_family_does_not_know_of(self, tmp_path):
        class Careless(Llama):
            stock = Stock("any")

        prunable = cut("llama", (3, 48), grouped_query=False)
        prunable.family = Careless()
        self.refused(prunable, tmp_path, "hidden size")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_affine_refit_survives_the_round_trip(family, tmp_path, random_windows):
    prepared = prepare(
        tiny_model(family, grouped_query=False), Wanda(), random_windows(8), calibration="affine", ridge=0.01
    )
    prunable = prepared.prunable
    prunable.cut((4, 17) * 3)
    written = save(prunable, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(written.path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, prunable.model(IDS).logits)
