"""The resource costs what its docstring says."""

from ffgym_decode_energy import PER_BYTE, PER_MAC, DecodeEnergy

from ffgym import Sublayer
from ffgym.costs.resource import Setting, costs_of, resource_named
from ffgym.testing.models import tiny_model

SETTING = Setting(context=100, number_bytes=2)


def test_an_mlp_channel_costs_its_arithmetic_and_its_weights() -> None:
    channel = Sublayer(0, "mlp", 48, 1, unit_params=36, unit_macs=36)
    assert DecodeEnergy().unit_price(channel, SETTING) == 36 * PER_MAC + 36 * 2 * PER_BYTE


def test_a_kv_group_also_costs_its_cache_and_its_scores() -> None:
    group = Sublayer(0, "attention", 2, 16, unit_params=10, unit_macs=10, query_heads_per_unit=2, head_dim=8)
    macs, numbers = 10 + 2 * 2 * 8 * 100, 10 + 2 * 8 * 100
    assert DecodeEnergy().unit_price(group, SETTING) == macs * PER_MAC + numbers * 2 * PER_BYTE


def test_a_model_has_a_cost_and_a_text() -> None:
    resource = resource_named("decode-energy")
    costs = costs_of(resource, tiny_model("llama"), context=100)
    assert len(costs.tables) == 6
    assert costs.rest > 0
    assert float(resource.text(1e13)) == 1000
