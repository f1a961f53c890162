"""The resource costs what its docstring says."""

import pytest
from ffgym_decode_energy import PER_BYTE, PER_MAC, DecodeEnergy

from ffgym import Sublayer
from ffgym.costs.resource import CostSetting, costs_of, resource_named
from ffgym.models.families import family_of
from ffgym.testing.conformance import ResourceConformance
from ffgym.testing.models import tiny_model

SETTING = CostSetting(context=100, number_bytes=2)


class TestDecodeEnergy(ResourceConformance):
    def make(self) -> DecodeEnergy:
        return DecodeEnergy()


def test_an_mlp_channel_costs_its_arithmetic_and_its_weights() -> None:
    channel = Sublayer(0, "mlp", 48, 1, unit_params=36, unit_macs=36)
    assert DecodeEnergy().unit_price(channel, SETTING) == 36 * PER_MAC + 36 * 2 * PER_BYTE


def test_a_kv_group_also_costs_its_cache_and_its_scores() -> None:
    group = Sublayer(0, "attention", 2, 16, unit_params=10, unit_macs=10, query_heads_per_unit=2, head_dim=8)
    macs, numbers = 10 + 2 * 2 * 8 * 100, 10 + 2 * 8 * 100
    assert DecodeEnergy().unit_price(group, SETTING) == macs * PER_MAC + numbers * 2 * PER_BYTE


@pytest.mark.parametrize("family", ["llama", "olmo2", "mixtral"])
def test_a_model_computes_with_every_weight_once_and_reads_it_and_the_cache(family: str) -> None:
    """Also where an attention of many heads is one unit, and where a token is sent to some of the experts."""
    model = tiny_model(family)
    dense = [sublayer.units for sublayer in family_of(model).sublayers(model)]

    def cost(resource: str, context: int) -> float:
        return costs_of(resource_named(resource), model, context=context).of(dense)

    read = 4 * cost("macs", 0) + 100 * cost("kv", 100)
    assert cost("decode-energy", 100) == PER_MAC * cost("macs", 100) + PER_BYTE * read


def test_it_is_printed_in_millijoules() -> None:
    assert DecodeEnergy().text(1e13) == "1e+03"
