"""Prompts are lm-eval's, splits do not touch, and token ids are cut where the context ends."""

from __future__ import annotations

import ast
from pathlib import Path

import made_up_tasks
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ffgym.data import examples, task_data
from ffgym.data.examples import (
    PROMPTS,
    Example,
    check_search_tasks,
    encode,
    examples_of,
    search_examples,
)
from ffgym.errors import ConfigError, DataError, UnknownNameError

ROWS = {
    "arc_easy": {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["1", "2"]}, "answerKey": "2"},
    "openbookqa": {
        "question_stem": "Sun is",
        "choices": {"text": ["hot", "no"], "label": ["A", "B"]},
        "answerKey": " A",
    },
}


def lm_eval_definition(task):
    """The task's own YAML, without what it takes to run it."""
    import lm_eval
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    (file,) = (Path(lm_eval.__file__).parent / "tasks").glob(f"*/{task}.yaml")
    definition = yaml.load(file.read_text(), Loader)
    if "include" in definition:
        definition = {**yaml.load((file.parent / definition["include"]).read_text(), Loader), **definition}
    return definition


@pytest.mark.parametrize("task", sorted(PROMPTS))
def test_prompts_are_those_of_lm_eval(task):
    """The same row through lm-eval's templates."""
    from lm_eval.utils import apply_template

    row = ROWS.get(task, ROWS["arc_easy"])
    definition = lm_eval_definition(task)

    def said(key):
        template = definition[key]
        if template in row:
            return row[template]
        return apply_template(template, row) if isinstance(template, str) else template

    answers = said("doc_to_choice")
    (example,) = examples_of(task, [row], PROMPTS[task])
    assert example.context == said("doc_to_text")
    assert [answer[1:] for answer in example.answers] == (
        ast.literal_eval(answers) if isinstance(answers, str) else answers
    )
    assert example.right == int(said("doc_to_target"))
    assert definition.get("target_delimiter", " ") == " "


class TestSplits:
    def test_a_search_sees_another_split_than_the_report(self, monkeypatch):
        made_up_tasks.install(monkeypatch)
        rows = task_data.task_dataset("arc_easy")[task_data.reported_split("arc_easy")]
        searched, reported = search_examples("arc_easy"), examples_of("arc_easy", rows, PROMPTS["arc_easy"])
        assert (len(searched), len(reported)) == (40, 60)
        assert all(e.context.startswith("Question: validation ") for e in searched)
        assert all(e.context.startswith("Question: test ") for e in reported)

    def test_a_question_that_is_reported_as_well_is_left_out(self, monkeypatch):
        def row(question):
            return {**ROWS["arc_easy"], "question": question}

        splits = {"validation": [row("a"), row("b"), row("c")], "test": [row("b"), row("d")]}
        monkeypatch.setattr(examples, "task_dataset", lambda _: splits)
        assert [e.context for e in search_examples("arc_easy")] == [f"Question: {q}\nAnswer:" for q in "ac"]

    def test_what_can_be_searched_on(self):
        assert list(PROMPTS) == ["arc_easy", "arc_challenge", "openbookqa"]
        for task in PROMPTS:
            assert "validation" in task_data.TASKS[task]
            assert task_data.reported_split(task) != "validation"

    def test_an_unknown_task_names_the_near_match_and_the_list(self):
        with pytest.raises(UnknownNameError, match="unknown multiple-choice task 'arc_eazy'") as caught:
            check_search_tasks(["arc_eazy"])
        assert "Did you mean 'arc_easy'?" in caught.value.hint
        assert "openbookqa" in caught.value.hint

    def test_a_task_of_which_all_is_reported_is_refused(self):
        with pytest.raises(UnknownNameError, match="'piqa'") as caught:
            check_search_tasks(["arc_easy", "piqa"])
        assert caught.value.hint == "Known: arc_challenge, arc_easy, openbookqa."

    def test_a_task_named_twice_is_refused(self):
        with pytest.raises(ConfigError, match="named twice"):
            check_search_tasks(["arc_easy", "arc_easy"])


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of letters that knows the pairs "r:" and ": ": where text is cut changes its tokens."""
    alphabet = sorted(set("Question:\nAnswerabcdefghijklm "))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", *alphabet, "r:", ": ", " a"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("r", ":"), (":", " "), (" ", "a")]))
    bpe.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", model_max_length=512)


class TestEncode:
    def test_context_and_answers_are_the_whole_texts_tokens(self, letters):
        example = Example("a", "Question: be?\nAnswer:", (" ab", " cd"), 1)
        got = encode(example, letters, context_limit=512)
        assert (got.task, got.right) == ("a", 1)
        for text, answer in zip(example.answers, got.answers, strict=True):
            assert letters.decode([*got.context, *answer]) == example.context.replace("?", "") + text
        assert letters.decode(got.answers[0]) == " ab"
        assert got.tokens == len(got.context) + len(got.answers[0]) + len(got.answers[1])

    def test_a_space_at_the_end_of_the_context_goes_to_the_answer(self, letters):
        """As in lm-eval: else the space would stand alone and its word begin without one."""
        got = encode(Example("a", "Answer: ", ("ab", "cd"), 0), letters, context_limit=512)
        assert letters.decode(got.context) == "Answer:"
        assert letters.decode(got.answers[0]) == " ab"

    def test_a_long_context_loses_its_beginning(self, letters):
        example = Example("a", "abcdefghijklm", ("bb", "ccc"), 0)
        whole, cut = (encode(example, letters, context_limit=limit) for limit in (512, 8))
        assert cut.context == whole.context[-5:]
        assert cut.answers == whole.answers

    def test_bos_comes_first_where_the_tokenizer_adds_one(self, letters):
        from tokenizers.processors import TemplateProcessing

        backend = Tokenizer.from_str(letters.backend_tokenizer.to_str())
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        adding = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>")
        example = Example("a", "abcdefghijklm", ("bb", "ccc"), 0)
        assert encode(example, adding, context_limit=512).context[0] == 1
        short = encode(example, adding, context_limit=8)
        assert short.context[0] == 1, "what is cut is the text"
        assert len(short.context) == 5
        assert encode(example, letters, context_limit=512).context[0] != 1

    @pytest.mark.parametrize(("answers", "have"), [(("bb", "ccc"), "2 to 3"), (("b", ""), "0 to 1")])
    def test_an_answer_longer_than_the_context_or_empty_is_refused(self, letters, answers, have):
        with pytest.raises(DataError, match=f"have {have} tokens, and they should have 1 to 2"):
            encode(Example("arc_easy", "ab", answers, 0), letters, context_limit=3)
