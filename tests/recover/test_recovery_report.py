"""The table and the card of a recovery."""

from __future__ import annotations

import math

import pytest
from printed import printed

from ffgym.recover.table import (
    Measured,
    RecoveryTable,
    recovered_card,
)
from ffgym.types import Evaluation

BEFORE, AFTER, DENSE = (2.0, 3.0, 4.0), (1.9, 2.9, 3.6), (1.0, 2.0, 3.0)
CARD = """---
library_name: transformers
base_model: "a/b"
---

# Pruned

Some words.

```console
# no heading
```

## Limits
"""


def table(*, dense: bool = True) -> RecoveryTable:
    rows = [
        Measured("before", Evaluation(BEFORE, 7), 1000),
        Measured("lora", Evaluation(AFTER, 7), 1000),
    ]
    if dense:
        rows.insert(0, Measured("dense", Evaluation(DENSE, 7), 2000))
    return RecoveryTable(tuple(rows), "Perplexity on a_b, report split.")


@pytest.mark.parametrize("dense", [True, False])
def test_the_table_compares_with_before(dense: bool) -> None:
    text = table(dense=dense).layout().markdown()
    assert "| lora | 16.44 ± 8.11 | -0.200 ± 0.430 tie | 1.0 k |" in text
    assert "| before | 20.09 ± 11.60 |  | 1.0 k |" in text
    assert ("| dense | 7.39 ± 4.27 | -1.000 ± 0.000 | 2.0 k |" in text) == dense
    assert "a\\_b" in text
    *_, before, lora = table(dense=dense).layout().as_dicts()
    assert (before["difference"], lora["difference"]) == (None, pytest.approx(-0.2))
    assert lora["difference_margin"] == pytest.approx(0.43, abs=1e-3)
    assert "-0.200 ± 0.430 tie" in printed(table(dense=dense).layout())


@pytest.mark.parametrize(
    ("losses", "said"),
    [((14.0, 15.0), "1.98e+06 ± 9.91e+05"), ((800.0, 800.0), "inf"), ((math.nan, 2.0), "NaN")],
)
def test_a_destroyed_model_is_written_as_in_the_table_of_a_run(losses: tuple[float, ...], said: str) -> None:
    rows = Measured("before", Evaluation((2.0, 3.0), 7), 1000), Measured("lora", Evaluation(losses, 7), 1000)
    assert f"| lora | {said} |" in RecoveryTable(rows, "").layout().markdown()


def test_plain_data_has_no_infinity() -> None:
    broken = RecoveryTable(
        (Measured("before", Evaluation((1000.0,), 7), 1), Measured("lora", Evaluation((math.nan,), 7), 1)), ""
    )
    rows = broken.layout().as_dicts()
    assert [row["perplexity"] for row in rows] == [None, None]
    assert [row["loss"] for row in rows] == [1000.0, None]
    assert "inf" in broken.layout().markdown()


def test_the_card_keeps_front_matter_and_demotes_the_old_headings() -> None:
    said = {"summary": ["Told."], "command": "ffgym recover x"}
    card = recovered_card(title="Recovered", is_kept=True, before=CARD, table=table(), **said)
    assert card.startswith('---\nlibrary_name: transformers\nbase_model: "a/b"\n---\n\n# Recovered')
    assert card.count("\n# ") == 2  # the title, and what is code
    assert "\n### Pruned\n" in card
    assert "\n#### Limits" in card
    assert "\n# no heading\n" in card
    assert "Told." in card
    assert "$ ffgym recover x" in card


@pytest.mark.parametrize("before", [None, "no front matter", "---\nunclosed"])
def test_a_card_without_front_matter_gets_one(before: str | None) -> None:
    card = recovered_card(title="Recovered", is_kept=True, before=before, summary=[], table=table(), command="c")
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- ffgym")
    assert ("## The model before that" in card) == (before is not None)
