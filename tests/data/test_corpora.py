import gzip
import json
from functools import partial

import datasets
import pyarrow
import pyarrow.feather
import pytest

from ffgym.data.assets import DEMO_TEXT
from ffgym.data.cache import write_folder_once
from ffgym.data.corpora import ENOUGH_CHARACTERS, check_text, load_text
from ffgym.errors import DataError, UnknownNameError

TEXTS = ["The first document.", "The second one, a little longer.", "Third."]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


@pytest.fixture
def demo_folder(tmp_path, monkeypatch):
    """The embedded default's files, small, where a download leaves them."""
    files = {
        "c4": "page one\npage two\n\npage one\n",
        "wiki": '<doc id="1" url="https://x" title="A < B">\nA\n\nAbout A.\n</doc>\n<doc id="2" title="B">\nB\n\n'
        "Inline <doc> and a < b stay.\n</doc>\n",
        "code": "int main() {}\n\nreturn\n",
        "technical": "Permission is granted.\n",
    }

    def fill(folder):
        for name, text in files.items():
            (folder / f"{name}.utf8").write_text(text, encoding="utf-8")

    monkeypatch.setenv("FFGYM_CACHE", str(tmp_path))
    place = f"{DEMO_TEXT.name}-{DEMO_TEXT.version}-{DEMO_TEXT.sha256[:12]}"
    return write_folder_once(tmp_path / "assets" / place, fill)


@pytest.fixture
def wikitext(tmp_path, monkeypatch):
    """A folder laid out like the hub's Salesforce/wikitext, in its place."""
    folder = tmp_path / "Salesforce" / "wikitext"
    rows = {split: ["", f" = {split} = \n", "", f" Text of {split} . \n"] for split in ("train", "validation", "test")}
    for split, texts in rows.items():
        target = folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(target))
    files = "".join(f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*\n" for split in rows)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}---\n# wikitext\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return folder, rows


@pytest.fixture
def c4(tmp_path, monkeypatch):
    """A folder laid out like the hub's allenai/c4, in its place, with a second shard that must not be read."""
    folder = tmp_path / "allenai" / "c4"
    (folder / "en").mkdir(parents=True)
    shards = {
        "c4-train.00000-of-01024.json.gz": ["train a", "train b"],
        "c4-train.00001-of-01024.json.gz": ["never read"],
        "c4-validation.00000-of-00008.json.gz": ["validation a"],
    }
    for name, texts in shards.items():
        with gzip.open(folder / "en" / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "timestamp": "t", "url": "u"}) + "\n" for text in texts)
    monkeypatch.chdir(tmp_path)


def test_demo_c4_is_one_document_a_line_and_keeps_a_repeated_page_once(demo_folder):
    corpus = load_text("demo:c4", role="search")
    assert corpus.documents == ("page one", "page two")
    assert (corpus.name, corpus.split) == ("demo:c4", "c4.utf8")


def test_demo_wiki_loses_its_doc_tags_and_nothing_else(demo_folder):
    corpus = load_text("demo:wiki", role="report")
    assert corpus.documents == ("A\n\nAbout A.", "B\n\nInline <doc> and a < b stay.")


@pytest.mark.parametrize("name", ["code", "technical"])
def test_demo_code_and_technical_are_one_document(demo_folder, name):
    assert load_text(f"demo:{name}", role="search").documents == ((demo_folder / f"{name}.utf8").read_text(),)


def test_an_unknown_demo_corpus_answers_with_the_near_match():
    with pytest.raises(UnknownNameError, match="Did you mean 'demo:wiki'"):
        load_text("demo:wikki", role="report")


@pytest.mark.parametrize("suffix", [".txt", ".utf8", ".md"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"book{suffix}"
    path.write_text("Chapter 1\n\nÉté.\n", encoding="utf-8")
    corpus = load_text(str(path), role="search")
    assert corpus.documents == ("Chapter 1\n\nÉté.\n",)
    assert corpus.split == path.name


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path):
    datasets.Dataset.from_dict({"text": [*TEXTS, None], "id": [0, 1, 2, 3]}).to_parquet(str(path))


def write_arrow_stream(path):
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path):
    pyarrow.feather.write_feather(pyarrow.table({"text": TEXTS}), str(path), compression="uncompressed")


def test_every_file_format_gives_the_same_documents(tmp_path):
    formats = (write_jsonl, "a.jsonl"), (write_parquet, "a.parquet"), (write_arrow_stream, "a.arrow")
    digests = set()
    for write, file in (*formats, (write_arrow_file, "b.arrow")):
        write(tmp_path / file)
        corpus = load_text(str(tmp_path / file), role="search")
        assert corpus.documents == tuple(TEXTS)
        digests.add(corpus.digest)
    assert len(digests) == 1


def test_a_folder_of_files_is_its_files(tmp_path):
    """A document is a file, not a line of it, and files of every suffix are read."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "b.txt").write_text("one\ntwo\n\nthree\n", encoding="utf-8-sig")
    (folder / "a.md").write_text("# Title\n\ntext\n")
    (folder / "README.md").write_text("What lies here.\n")
    write_jsonl(folder / "more" / "c.jsonl")
    corpus = load_text(str(folder), role="report")
    assert corpus.documents == ("# Title\n\ntext\n", "one\ntwo\n\nthree\n", *TEXTS)


def test_a_folder_of_one_file_is_the_same_text_as_the_file(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text("line\nby\nline\n" * 9)
    digests = {load_text(str(tmp_path / name), role="report").digest for name in ("texts", "texts/book.txt")}
    assert len(digests) == 1


def test_files_of_a_folder_are_told_apart_by_the_split_in_their_names(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text(f"text\nto {split}\n")
    assert load_text(str(folder), role="report").documents == ("text\nto test\n",)
    assert load_text(str(folder), role="search").documents == ("text\nto train\n",)
    assert load_text(f"{folder}@test", role="search").documents == ("text\nto test\n",)


def test_a_folder_with_a_dataset_card_is_read_as_its_card_says(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: one.txt\n---\n")
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text(name)
    assert load_text(str(folder), role="search").documents == ("one.txt",)


def test_half_a_surrogate_pair_is_no_reason_to_stop(tmp_path):
    """Web text that was cut at a length has them, and JSON can write them down."""
    file = tmp_path / "cut.jsonl"
    file.write_text('{"text": "a rabbit \\ud83d ran"}\n')
    assert load_text(str(file), role="search").documents == ("a rabbit ? ran",)


def test_a_byte_order_mark_and_lines_without_text_are_skipped(tmp_path):
    file = tmp_path / "notepad.jsonl"
    file.write_text('{"text": "one"}\n{"id": 2, "text": null}\n{"text": "three"}\n', encoding="utf-8-sig")
    assert load_text(str(file), role="search").documents == ("one", "three")


@pytest.mark.parametrize("name", ["user@host", "a:b", "v1.0"])
def test_a_folder_may_have_any_name(tmp_path, name):
    folder = tmp_path / name
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder))
    corpus = load_text(str(folder), role="search")
    assert (corpus.documents, corpus.split) == (tuple(TEXTS), "all")


def test_no_more_than_enough_is_read(tmp_path):
    line = json.dumps({"text": "word " * (ENOUGH_CHARACTERS // 8)}) + "\n"
    (tmp_path / "long.jsonl").write_text(2 * line + "never read")
    lengths = [len(document) for document in load_text(str(tmp_path / "long.jsonl"), role="search").documents]
    assert lengths == [ENOUGH_CHARACTERS // 8 * 5, ENOUGH_CHARACTERS // 8 * 3]
    (tmp_path / "long.txt").write_text("word " * (ENOUGH_CHARACTERS // 5 + 1))
    (document,) = load_text(str(tmp_path / "long.txt"), role="search").documents
    assert len(document) == ENOUGH_CHARACTERS


def test_the_digest_tells_where_one_document_ends(tmp_path):
    digests = set()
    for texts in (["ab", "c"], ["a", "bc"]):
        write_jsonl(tmp_path / "a.jsonl", texts)
        digests.add(load_text(str(tmp_path / "a.jsonl"), role="search").digest)
    assert len(digests) == 2


@pytest.mark.parametrize("reported", ["test", "validation", "train"])
def test_a_saved_dataset_reports_on_test_or_else_validation_or_else_train(tmp_path, reported):
    order = ["test", "validation", "train", "extra"]
    parts = {split: datasets.Dataset.from_dict({"text": [split]}) for split in order[order.index(reported) :]}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert load_text(str(tmp_path / "saved"), role="report").documents == (reported,)
    assert load_text(str(tmp_path / "saved"), role="search").documents == ("train",)


def test_a_saved_dataset_with_splits_follows_the_role_or_the_name(tmp_path):
    parts = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "validation", "extra")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    spec = str(tmp_path / "saved")
    assert load_text(spec, role="calibration").documents == ("train",)
    assert load_text(spec, role="report").documents == ("validation",)
    assert load_text(f"{spec}@extra", role="report").documents == ("extra",)
    with pytest.raises(UnknownNameError, match=r"unknown split of corpus .*: 'extar'\n.*extra, train, val"):
        load_text(f"{spec}@extar", role="report")


def test_wikitext_reports_on_test_and_searches_on_train(wikitext):
    _, rows = wikitext
    report = load_text("wikitext", role="report")
    assert report.documents == tuple(rows["test"])
    assert report.split == "wikitext-2-raw-v1, test"
    assert load_text("wikitext", role="search").documents == tuple(rows["train"])
    assert load_text("wikitext", role="calibration").split == "wikitext-2-raw-v1, train"


def test_c4_reads_one_shard_of_the_split_that_the_role_wants(c4):
    assert load_text("c4", role="calibration").documents == ("train a", "train b")
    assert load_text("c4", role="search").documents == ("train a", "train b")
    report = load_text("c4", role="report")
    assert report.documents == ("validation a",)
    assert report.split == "en/c4-validation.00000-of-00008.json.gz, validation"


def test_subset_and_split_can_be_named(wikitext):
    folder, rows = wikitext
    corpus = load_text(f"{folder}:wikitext-2-raw-v1@validation", role="search")
    assert corpus.documents == tuple(rows["validation"])
    assert corpus.split == "wikitext-2-raw-v1, validation"


@pytest.fixture
def hub_answers(monkeypatch):
    """Whatever it is asked for, the hub says that it is there."""
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: None)


def test_a_hub_id_is_split_into_id_subset_and_split(wikitext, hub_answers, monkeypatch):
    folder, rows = wikitext
    asked = []
    load_dataset = datasets.load_dataset

    def local(path, subset, **options):
        asked.append((path, subset))
        return load_dataset(str(folder), subset, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    corpus = load_text("someone/split-text:wikitext-2-raw-v1@test", role="search")
    assert asked == [("someone/split-text", "wikitext-2-raw-v1")]
    assert corpus.documents == tuple(rows["test"])


def test_an_unknown_subset_is_an_error(wikitext):
    folder, _ = wikitext
    with pytest.raises(DataError, match="wikitext-2-raw-v1"):
        load_text(f"{folder}:wikitext-9", role="search")


def test_a_hub_that_cannot_be_reached_says_what_works_without_it(monkeypatch):
    def unreachable(path, subset, **options):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for spec in ("wikitext", "c4", "someone/some-text"):
        with pytest.raises(DataError, match="reach") as caught:
            load_text(spec, role="search")
        assert "demo:c4" in caught.value.hint
        assert "Did you mean" not in caught.value.hint
    with pytest.raises(DataError) as caught:
        load_text("wikitxt", role="search")
    assert caught.value.hint.startswith("Did you mean 'wikitext'? ")


def test_a_wrong_name_is_asked_for_once_and_answered_with_the_file_that_was_meant(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked for half a minute"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "law.txt").write_text("text")
    with pytest.raises(DataError, match=r"corpus 'lawtxt' is no file or folder here, and .* cannot be reach") as caught:
        load_text("lawtxt", role="search")
    assert caught.value.hint.startswith("Did you mean 'law.txt'? ")
    with pytest.raises(DataError, match="does not exist") as caught:
        load_text(f"{tmp_path}/laws.txt", role="search")
    assert caught.value.hint.startswith(f"Did you mean '{tmp_path}/law.txt'? ")


def test_a_data_set_that_was_loaded_before_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "texts" / "train.parquet"))
    datasets.load_dataset(str(tmp_path / "texts"), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "cache" / "texts").rename(tmp_path / "cache" / "someone___texts")
    assert load_text("someone/texts", role="search").documents == tuple(TEXTS)


def test_a_file_has_no_split(tmp_path):
    (tmp_path / "law.txt").write_text("text")
    with pytest.raises(DataError, match=r"law\.txt' has neither subsets nor splits") as caught:
        check_text(f"{tmp_path}/law.txt@train")
    assert caught.value.hint == "Leave '@train' out."


@pytest.mark.parametrize("spec", ["3*law.txt", "law.txt,web.txt", "70%*web.txt", "1/3*web.txt", "web.txt*3"])
def test_what_is_nearly_a_mixture_is_answered_with_one(spec):
    with pytest.raises(DataError, match="does not exist") as caught:
        check_text(spec)
    assert '["3*demo:c4", "mine.txt"]' in caught.value.hint


@pytest.mark.parametrize("name", ["someone/nothing", "someone/nothing-1.0"])
def test_a_hub_dataset_that_does_not_exist_is_named(hub_answers, monkeypatch, name):
    def unknown(path, subset, **options):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(DataError, match=f"no dataset '{name}'"):
        load_text(name, role="search")


@pytest.mark.parametrize("spec", ["missing.txt", "folder/missing.jsonl", "/no/such/folder", "./nothing", "a.b/c/d"])
def test_a_missing_file_or_folder_is_an_error_that_a_check_finds(spec):
    for refuse in (check_text, partial(load_text, role="search")):
        with pytest.raises(DataError, match="does not exist"):
            refuse(spec)


@pytest.mark.parametrize("spec", ["", "a@b@c", "wikitext@train[:50%]"])
def test_a_spec_that_is_not_understood_is_an_error(spec):
    with pytest.raises(DataError, match="not understood"):
        load_text(spec, role="search")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.parquet", b"PAR1 nonsense", "damaged"),
        ("a.arrow", b"nonsense", "damaged"),
        ("a.txt", b"caf\xe9", r"not UTF-8.*\n.*iconv -f LATIN1 -t UTF-8"),
        ("a.txt", "a text of Windows".encode("utf-16-le"), r"holds NUL characters.*\n.*iconv -f UTF-16LE -t UTF-8"),
        ("a.docx", b"x", r"ends in '\.docx', which cannot be read\n .*\.txt, \.utf8"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.jsonl", b"\n", "holds no text"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": \n',
            r"line 2 of corpus file .* is not JSON: Expecting value: column \d+",
        ),
        ("a.jsonl", b'{"text": "a", "id": ' + b"9" * 5000 + b"}", r"line 1 of corpus file .* is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"line 1 of corpus file .* is not JSON"),
        ("a.jsonl", b'{"text": 5}', "line 1 .*: 'text' is of type int, not text"),
        ("a.jsonl", b'{"text": ["x"]}', "line 1 .*: 'text' is of type list, not text"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "columns: body, id"),
    ],
)
def test_what_a_file_cannot_be_read_for_is_said(tmp_path, file, content, said):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_text(str(tmp_path / file), role="search")


def test_a_missing_text_column_lists_the_columns(tmp_path):
    rows = datasets.Dataset.from_dict({"body": TEXTS, "id": [0, 1, 2]})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        with pytest.raises(DataError, match="columns: body, id"):
            load_text(str(tmp_path / name), role="search")


def test_a_folder_that_holds_no_data_set_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        load_text(str(tmp_path / "empty"), role="search")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        load_text(str(tmp_path / "saved"), role="search")
