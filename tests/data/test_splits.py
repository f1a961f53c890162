from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ffgym.config.mixture import shares
from ffgym.config.tables import DataTable
from ffgym.data import splits
from ffgym.data.corpora import Corpus
from ffgym.data.splits import ROLES
from ffgym.errors import DataError, UnknownNameError
from ffgym.prepare.parts import splits_of

WORDS = 3000


def word_tokenizer(*, bos=False):
    """Every word of the test corpora is one token, so that equal ids mean the same place in the text."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"w{number}": number + 2 for number in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", model_max_length=16)


PLAIN = word_tokenizer()


def words(first, count):
    return " ".join(f"w{number}" for number in range(first, first + count))


@pytest.fixture
def corpora(tmp_path):
    """Two texts without a word in common, and a second name for the first of them."""
    paths = {"a": tmp_path / "a.txt", "b": tmp_path / "b.txt", "copy": tmp_path / "copy.txt"}
    paths["a"].write_text(words(0, 2000))
    paths["copy"].write_text(words(0, 2000))
    paths["b"].write_text(words(2000, 1000))
    return {name: str(path) for name, path in paths.items()}


def config(
    calibration, search, report, *, window=10, calibration_tokens=40, search_tokens=100, report_tokens=30, bos="every"
):
    return DataTable(**locals())


def test_splits_hold_what_was_asked(corpora):
    made = splits_of(config(corpora["a"], corpora["a"], corpora["b"]), PLAIN, context_limit=64)
    assert made.calibration.windows.shape == (4, 10)
    assert made.search.windows.shape == (10, 10)
    assert made.report.windows.shape == (3, 10)
    assert made.report.windows.dtype == torch.int64
    assert made.report.name == f"{corpora['b']}/report"
    assert (made.search.role, made.search.parts[0].corpus.split, made.search.bos) == ("search", "a.txt", "none")
    # consecutive windows of one text, in the order of the roles
    assert made.calibration.windows.flatten().tolist() == list(range(2, 42))
    assert made.search.windows.flatten().tolist() == list(range(42, 142))


def test_tokens_are_rounded_up_to_whole_windows(corpora):
    asked = config(corpora["a"], corpora["a"], corpora["b"], calibration_tokens=1, search_tokens=11, report_tokens=10)
    made = splits_of(asked, PLAIN, context_limit=64)
    assert [len(split.windows) for split in (made.calibration, made.search, made.report)] == [1, 2, 1]


NAMES = st.sampled_from(["0.md", "1.md", "2.md", ("0.md", "2.md"), ("3*2.md", "1.md"), ("2.md", "0.5*0.md")])


@pytest.fixture(scope="module")
def three_texts(tmp_path_factory):
    """Files 0.md, 1.md and 2.md in the working directory: two names of one text, and another."""
    folder = tmp_path_factory.mktemp("texts")
    for number, first in enumerate((0, 0, 1000)):
        (folder / f"{number}.md").write_text(words(first, 1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.mark.usefixtures("three_texts")
@settings(max_examples=40)
@given(
    names=st.lists(NAMES, min_size=3, max_size=3),
    window=st.integers(2, 20),
    tokens=st.lists(st.integers(80, 300), min_size=3, max_size=3),
)
def test_splits_never_touch(names, window, tokens):
    sizes = {f"{role}_tokens": count for role, count in zip(ROLES, tokens, strict=True)}
    made = splits_of(config(*names, window=window, **sizes), PLAIN, context_limit=64)
    parts = [made.calibration, made.search, made.report]
    ids = [token for part in parts for token in part.windows.flatten().tolist()]
    assert len(ids) == len(set(ids))
    for split, corpora, asked_for in zip(parts, names, tokens, strict=True):
        windows = split.windows
        assert 0 <= windows.numel() - asked_for < window
        assert sorted(map(tuple, windows.tolist())) == sorted(
            tuple(row) for part in split.parts for row in part.windows.tolist()
        )
        for part, share in zip(split.parts, shares(corpora).values(), strict=True):
            assert part.share == share
            assert abs(len(part.windows) - share * len(windows)) < 1
            assert (part.windows.diff(dim=1) == 1).all()  # whole windows of the text, in its order
            assert (part.windows[1:, 0] == part.windows[:-1, -1] + 1).all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 150))
def test_after_any_number_of_windows_every_corpus_has_its_share(weights, count):
    parts = [Fraction(weight, sum(weights)) for weight in weights]
    turns = splits.interleaved(parts, count)
    assert len(turns) == count
    assert turns == splits.interleaved(parts, count + 10)[:count]
    assert all(abs(turns.count(i) - share * count) < 1 for i, share in enumerate(parts))


def test_a_mixture_takes_turns(corpora):
    asked = config(corpora["a"], ("3*" + corpora["a"], corpora["b"]), corpora["b"], search_tokens=80, bos="first")
    made = splits_of(asked, word_tokenizer(bos=True), context_limit=64)
    assert made.search.text == f"75% {corpora['a']} + 25% {corpora['b']}"
    # a after the four windows of calibration, b from its beginning, which has the BOS; the report follows it
    assert made.search.windows[:, 1].tolist() == [42, 52, 62, 2002, 72, 82, 92, 2012]
    assert made.report.windows[0, 0] == 2002 + 19
    assert made.search.bos == made.report.bos == "none"
    assert splits_of(asked, word_tokenizer(bos=True), context_limit=64).search.digest == made.search.digest


def test_a_mixture_of_a_text_with_itself_is_refused(corpora):
    asked = config((corpora["a"], corpora["copy"]), corpora["a"], corpora["b"])
    with pytest.raises(DataError, match=r"data\.calibration mixes a text with itself: .*a\.txt' and .*copy\.txt'"):
        splits_of(asked, PLAIN, context_limit=64)


def test_a_corpus_too_short_for_its_share_is_named_with_what_it_has(corpora):
    asked = config(corpora["a"], (corpora["a"], "3*" + corpora["b"]), corpora["b"], search_tokens=1600)
    with pytest.raises(DataError) as caught:
        splits_of(asked, PLAIN, context_limit=64)
    assert (
        "b.txt' (b.txt) holds 1,000 tokens, but 1,230 were asked of it (search 1,200 as its share of 75% + report 30"
        in (caught.value.message)
    )
    assert caught.value.hint.startswith(
        "Lower data.search_tokens to at most 1,290, give this corpus less weight, or name a"
    )
    fits = asked.model_copy(update={"search_tokens": 1290})
    assert splits_of(fits, PLAIN, context_limit=64).search.windows.numel() == 1290


def test_a_corpus_of_a_mixture_that_is_not_known_is_named(corpora):
    for name, error in (("demo:c5", UnknownNameError), (corpora["a"] + ".txt", DataError)):
        with pytest.raises(error, match=name) as caught:
            splits_of(config((corpora["a"], name), corpora["a"], corpora["b"]), PLAIN, context_limit=64)
        assert "demo:c4" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "tokens", "refused"),
    [
        (
            ("a", "b", "copy.md"),
            (600, 300, 300),
            r"a\.txt' of data\.calibration and corpus .*copy\.md' of data\.report",
        ),
        (("b", "a", "copy.md"), (600, 300, 300), r"a\.txt' of data\.search and corpus .*copy\.md' of data\.report"),
        (("b", ("a", "3*copy.md"), "b"), (60, 600, 60), r"of data\.search and corpus .* of data\.search"),
        # One window of twenty, which is less than a tenth of either split.
        ((("19*a", "end.md"), "a", "b"), (1200, 60, 960), r"end\.md' of data\.calibration and corpus .*b\.txt'"),
        # 5 % of the report split, and all of the search split.
        (("b", "middle.md", "a"), (60, 60, 1200), r"middle\.md' of data\.search and corpus .*a\.txt' .* text: 100%"),
    ],
)
def test_a_copy_of_a_text_is_refused_beside_it(corpora, tmp_path, names, tokens, refused):
    parts = {"copy.md": words(0, 2000) + "\n", "end.md": words(2900, 70), "middle.md": words(900, 70)}
    for name, text in parts.items():
        (tmp_path / name).write_text(text)

    def named(name):
        weight, star, name = name.rpartition("*")
        return weight + star + corpora.get(name, str(tmp_path / name))

    texts = [named(each) if isinstance(each, str) else tuple(map(named, each)) for each in names]
    sizes = dict(zip(("calibration_tokens", "search_tokens", "report_tokens"), tokens, strict=True))
    with pytest.raises(DataError, match=refused) as raised:
        splits_of(config(*texts, window=60, **sizes), PLAIN, context_limit=64)
    assert "the same for both" in raised.value.hint


def test_a_quotation_is_no_copy(corpora, tmp_path):
    other = tmp_path / "other.md"
    other.write_text(f"{words(2000, 300)} {words(0, 58)} {words(2400, 300)} {words(100, 58)} {words(2700, 300)}")
    sizes = {"calibration_tokens": 600, "search_tokens": 600, "report_tokens": 900}
    asked = config(corpora["a"], corpora["a"], str(other), window=60, **sizes)
    assert len(splits_of(asked, PLAIN, context_limit=64).report.windows) == 15


@pytest.mark.parametrize(("new", "is_refused"), [(500, True), (1900, False)])
def test_a_text_that_repeats_itself_is_refused_where_two_roles_read_it(corpora, tmp_path, new, is_refused):
    """Its end has some new words, and then its beginning once more, as a file that was appended to."""
    file = tmp_path / "twice.txt"
    file.write_text(f"{words(0, 1000)} {words(1000, new)} {words(0, 1000)}")
    sizes = {"window": 60, "calibration_tokens": 60, "search_tokens": 900, "report_tokens": 960}
    asked = config(corpora["b"], str(file), str(file), **sizes)
    if not is_refused:  # what repeats is not read
        assert len(splits_of(asked, PLAIN, context_limit=64).report.windows) == 16
        return
    refused = r"twice\.txt' repeats itself: 37% of what data\.search reads of it stands in data\.report's part"
    with pytest.raises(DataError, match=refused) as raised:
        splits_of(asked, PLAIN, context_limit=64)
    assert "Remove the duplicates" in raised.value.hint


NUMBERS = """
import ffgym

class Numbers(ffgym.CorpusSource):
    name = "numbers"

    def read(self, part, role):
        first = 150 if part == "late" else 0
        return "all", [" ".join(f"w{number}" for number in range(first, 2000))]

@ffgym.hookimpl
def ffgym_corpora():
    return [Numbers]
"""


def test_a_plugin_that_gives_one_text_by_many_names_leaks_nothing_into_the_report(install):
    install("acme-numbers", NUMBERS)
    sizes = {"window": 60, "calibration_tokens": 60, "search_tokens": 300, "report_tokens": 300}
    made = splits_of(config("numbers:a", "numbers:a", "numbers:b", **sizes), PLAIN, context_limit=64)
    assert made.search.windows.max() < made.report.windows.min()
    with pytest.raises(DataError, match=r"'numbers:a' of data\.search and corpus 'numbers:late' of data\.report"):
        splits_of(config("numbers:a", "numbers:a", "numbers:late", **sizes), PLAIN, context_limit=64)


def test_bos_before_the_first_window_alone(corpora):
    asked = config(corpora["a"], corpora["a"], corpora["b"], bos="first")
    made = splits_of(asked, word_tokenizer(bos=True), context_limit=64)
    assert [made.calibration.bos, made.search.bos, made.report.bos] == ["first", "none", "first"]
    assert made.calibration.windows.flatten()[:3].tolist() == [1, 2, 3]
    assert made.report.windows.flatten()[0] == 1
    assert (made.search.windows != 1).all()


def test_every_window_begins_with_bos_and_no_text_is_lost_or_shared(corpora):
    asked = config(corpora["a"], corpora["a"], corpora["b"])
    made = splits_of(asked, word_tokenizer(bos=True), context_limit=64)
    assert made.calibration.bos == made.search.bos == made.report.bos == "every"
    assert made.search.windows.shape == (10, 10)
    for split in (made.calibration, made.search, made.report):
        assert (split.windows[:, 0] == 1).all()
    assert made.calibration.parts[0].text.tolist() == list(range(2, 2 + 4 * 9))
    assert made.search.windows[:, 1:].flatten().tolist() == list(range(2 + 4 * 9, 2 + 14 * 9))
    # and a text as long as that is long enough
    longest = asked.model_copy(update={"search_tokens": (2000 // 9 - 4) * 10})
    assert len(splits_of(longest, word_tokenizer(bos=True), context_limit=64).search.windows) == 2000 // 9 - 4
    with pytest.raises(DataError, match=r"holds 2,223 tokens, but 2,230 were asked of it") as caught:
        splits_of(asked.model_copy(update={"search_tokens": 2190}), word_tokenizer(bos=True), context_limit=64)
    assert "Lower data.search_tokens to at most 2,180" in caught.value.hint


def test_digests_follow_the_windows(corpora):
    same = [splits_of(config(corpora["a"], corpora["a"], corpora["b"]), PLAIN, context_limit=64) for _ in range(2)]
    other = splits_of(config(corpora["a"], corpora["a"], corpora["b"], window=20), PLAIN, context_limit=64)
    assert same[0].search.digest == same[1].search.digest != other.search.digest


def test_tokenising_a_part_gives_the_tokens_of_the_whole():
    """A byte-level BPE that really merges, and documents that end in every awkward way."""
    documents = [f" = Title {n} = \n" if n % 3 else f"Ünïcode text{'!' * (n % 7)}  \n\n" * (n % 5) for n in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    corpus = Corpus("x", "y", tuple(documents), "")
    whole = fast("\n\n".join(documents), verbose=False)["input_ids"]
    for count in range(1, len(whole) + 50, 37):
        assert splits.first_tokens(corpus, count, fast, bos=False) == whole[:count]


def test_only_as_much_text_is_tokenised_as_is_needed(corpora):
    seen = []

    class Counting:
        bos_token_id = None

        def __call__(self, text, **options):
            seen.append(len(text))
            return PLAIN(text, **options)

    splits_of(config(corpora["a"], corpora["a"], corpora["b"]), Counting(), context_limit=64)
    assert max(seen) < len(words(0, 2000)) / 4


def test_a_word_that_the_part_cuts_is_not_the_last_token():
    """The part that is read first, 5 characters a token, ends inside the last word that is asked for."""
    text = f"{words(1000, 2)} {words(100, 900)}"
    corpus = Corpus("text", "all", (text,), "")
    assert splits.first_tokens(corpus, 40, PLAIN, bos=False) == PLAIN(text)["input_ids"][:40]


def test_a_long_text_brings_no_warning(corpora, caplog):
    splits_of(config(corpora["a"], corpora["a"], corpora["b"]), PLAIN, context_limit=64)
    assert "sequence length" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"window": 65}, "longer than the model's context of 64", "at most 64"),
        ({"search_tokens": 3000}, r"holds 2,000 tokens, but 3,040 were asked .*search 3,000", "at most 1,960"),
        (
            {"calibration_tokens": 2000, "search_tokens": 2000},
            "holds 2,000 tokens",
            "Lower data.calibration_tokens and",
        ),
        ({"report_tokens": 1001}, "holds 1,000 tokens, but 1,010", "data.report_tokens to at most 1,000"),
    ],
)
def test_what_cannot_be_cut_is_refused(corpora, change, message, hint):
    with pytest.raises(DataError, match=message) as caught:
        splits_of(config(corpora["a"], corpora["a"], corpora["b"], **change), PLAIN, context_limit=64)
    assert hint in caught.value.hint


def test_a_corpus_shorter_than_a_window_is_refused(corpora, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(words(0, 7))
    with pytest.raises(DataError, match=r"short\.txt.* holds 7 tokens, less than one window of 10") as caught:
        splits_of(config(corpora["a"], corpora["a"], str(short)), PLAIN, context_limit=64)
    assert "data.window to at most 7" in caught.value.hint


@pytest.mark.demo
def test_the_demo_corpora_are_long_enough_for_the_defaults():
    from ffgym.models.loading import load

    loaded = load("demo")
    asked = config(
        "demo:c4",
        "demo:c4",
        "demo:wiki",
        window=1024,
        calibration_tokens=32768,
        search_tokens=131072,
        report_tokens=16384,
    )
    made = splits_of(asked, loaded.tokenizer, context_limit=loaded.context_limit)
    assert [len(split.windows) for split in (made.calibration, made.search, made.report)] == [32, 128, 16]
    assert "<doc" not in loaded.tokenizer.decode(made.report.windows.flatten())
