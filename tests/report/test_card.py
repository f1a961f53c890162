import re

import pytest
import yaml
from table_costs import table_costs

from ffgym.report.card import model_card, stated_license
from ffgym.report.table import ReportTable, Row
from ffgym.types import Allocation, Sublayer

SUBLAYERS = [
    Sublayer(0, "attention", 3, 192, 10, 10, 3, 64, 2),
    Sublayer(0, "mlp", 1536, 1, 2, 2, depth=2),
    Sublayer(1, "attention", 3, 192, 10, 10, 3, 64, 2),
    Sublayer(1, "mlp", 1536, 1, 2, 2, depth=2),
]
TABLE = ReportTable(
    (
        Row("dense", 24.0, None, 0.0, 0.0, table_costs(100, 100, 10)),
        Row("found", 33.0, None, 0.2, 0.16, table_costs(84, 84, 8), is_found=True),
    ),
    "Perplexity on some text.",
)


def card(**kwargs) -> str:
    arguments = {
        "title": "tiny, pruned",
        "base_model": "someone/tiny",
        "license": {"license": "apache-2.0"},
        "table": TABLE,
        "sublayers": SUBLAYERS,
        "allocation": Allocation((3, 1200, 1, 1001), 4964, 6204),
        "quantity": "parameters",
        "command": "ffgym run --agent reinforce --criterion wanda",
        "seed": 3,
        "splits": {"calibration": "some text, 32,768 tokens", "report": "other text, 16,384 tokens"},
        "caveats": ["The demo model is a dequantised Q4_1."],
    }
    return model_card(**(arguments | kwargs))


def front_matter(text: str) -> dict:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def test_front_matter_is_what_the_hub_reads():
    assert front_matter(card()) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "someone/tiny",
        "license": "apache-2.0",
        "tags": ["ffgym", "pruning", "structured-pruning"],
    }


def test_what_is_not_known_is_left_out():
    text = card(base_model=None, license={})
    assert not {"base_model", "license"} & front_matter(text).keys()
    assert "licence holds for this one, too. None could be read" in text
    assert "None could be read" not in card()
    assert "None" not in text.replace("None could be read", "")


def test_card_says_how_to_load_rerun_and_judge_the_model():
    text = card()
    for part in (
        "trust_remote_code=True",
        "import ffgym.models",
        "ffgym run --agent reinforce --criterion wanda",
        "seed: 3",
        "calibration split: some text, 32,768 tokens",
        "20.0% of the parameters",
        'the row "found" of the table: perplexity 33.00, where the dense model has 24.00',
        "| dense | 24.00 |",
        "| 1 | 1 of 3 | 1,001 of 1,536 |",
        "dequantised Q4_1",
    ):
        assert part in text


def test_the_loading_example_is_python():
    (code,) = re.findall(r"```python\n(.*?)```", card(), re.DOTALL)
    compile(code, "card", "exec")


def test_it_names_the_kinds_of_sublayers_that_the_model_has_and_no_others():
    assert "| layer | attention: KV groups | MLP: intermediate channels |\n" in card()
    assert "of its attention and MLP sublayers removed" in card()
    mixed = [*SUBLAYERS[:3], Sublayer(1, "experts", 8, 1, 500, 5, depth=2, experts_per_token=2)]
    text = card(sublayers=mixed, allocation=Allocation((3, 1200, 1, 5), 4964, 6204))
    assert "of its attention and MLP sublayers and experts removed" in text
    assert "| layer | attention: KV groups | MLP: intermediate channels | experts |\n" in text
    assert "| 1 | 1 of 3 |  | 5 of 8 |" in text


class TestLicense:
    @pytest.mark.parametrize(
        ("front", "said"),
        [
            ("license: mit", {"license": "mit"}),
            ("license: 'apache-2.0'  # as the base", {"license": "apache-2.0"}),
            (
                'base_model: a/b\nlicense: other\nlicense_name: "one\'s own"\nlicense_link: https://x.org/#terms',
                {"license": "other", "license_name": "one's own", "license_link": "https://x.org/#terms"},
            ),
            ("license: [mit, apache-2.0]\ntags:\n- license: mit", {}),
            ("license:\n- mit", {}),
        ],
    )
    def test_is_what_the_card_says_of_it(self, front, said, tmp_path):
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\nlicense: not/this\n")
        assert stated_license(tmp_path / "README.md") == said

    def test_no_card_or_a_damaged_one_ends_no_run(self, tmp_path):
        assert stated_license(None) == {}
        assert stated_license(tmp_path / "README.md") == {}
        (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
        assert stated_license(tmp_path / "README.md") == {}
