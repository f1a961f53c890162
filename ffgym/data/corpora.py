"""Corpora: text by name, from the embedded default, from files, or from the Hugging Face hub.

The table in docs/choices.md says what a name (a spec) may be. ``NAME`` or ``NAME:PART`` is read by the plugin of this
name, a `CorpusSource`, as the built-in names are.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

from ffgym.config.mixture import EXAMPLE
from ffgym.data.assets import DEMO_TEXT, fetch
from ffgym.data.hub import hub_error, is_hub_id
from ffgym.errors import DataError, PluginError, UnknownNameError, first_line
from ffgym.plugins import manager
from ffgym.plugins.bases import Plugin
from ffgym.plugins.built_ins import BUILTINS
from ffgym.plugins.contracts import call_plugin
from ffgym.plugins.discovery import NAME

Role = Literal["calibration", "search", "report"]

COLUMN = "text"
# About 15 million tokens: far more than any split here needs, far less than a web corpus would fill memory with.
ENOUGH_CHARACTERS = 64_000_000
DEMO_CORPORA = ("c4", "wiki", "code", "technical")
SPEC = re.compile(r"(?P<path>[^@]+?)(?::(?P<subset>[^:@/\\]+))?(?:@(?P<split>\w[\w.-]*))?")
# Names with these suffixes are files; org/text-1.0 is a hub id.
FILE_SUFFIXES = {".txt", ".text", ".utf8", ".md", ".jsonl", ".jsonlines", ".ndjson", ".json", ".csv", ".tsv"}
FILE_SUFFIXES |= {".parquet", ".arrow", ".gz", ".xz", ".bz2", ".zst", ".zip"}
FOLDER_HINT = "Name a .txt or .jsonl file, a folder of nothing but such files, or one that save_to_disk has written."
CONVERT = "iconv -f {} -t UTF-8 OLD.txt > NEW.txt"
OFFLINE_HINT = (
    "Use a corpus that needs no hub: demo:c4, demo:wiki, a .txt or .jsonl file, or a folder written by"
    " Dataset.save_to_disk on a machine that has the network."
)


@dataclass(frozen=True)
class Corpus:
    """Some text and where it came from."""

    name: str  # the spec that named it, e.g. "demo:c4"
    split: str  # which part of it was read, e.g. "wiki.utf8" or "wikitext-2-raw-v1, test"
    documents: tuple[str, ...] = field(repr=False)
    digest: str  # sha256 over the documents; equal texts have equal digests, whatever they are called


class CorpusSource(Plugin, ABC):
    """Reads text that is named ``NAME`` or ``NAME:PART``."""

    kind = "corpus"

    @abstractmethod
    def read(self, part: str | None, role: Role) -> tuple[str, Iterable[str]]:
        """Read a part of the text; the beginning is enough where it is long.

        Args:
            part: what follows the name and a colon; ``None`` where nothing does.
            role: what the text is read for. The report must not share text with the others.

        Returns:
            what was read, for the record (``"train"``), and its documents in reading order.
        """


def load_text(spec: str, *, role: Role) -> Corpus:
    """Read a corpus; the table in docs/choices.md says what a spec may be.

    Of a corpus longer than ``ENOUGH_CHARACTERS`` only the beginning is read.

    Args:
        role: what it is read for, which chooses the split where the spec does not.

    Raises:
        DataError: a missing or damaged file, no text column, no text, an unknown split, a hub that cannot be reached.
        PluginError: a plugin failed.
        UnknownNameError: a ``demo:`` corpus that does not exist.
        AssetError: the embedded default could not be fetched.
    """
    return _found(spec)(role)


def check_text(spec: str) -> None:
    """Refuse what `load_text` would refuse without reading: a missing file, an unknown ``demo:`` corpus, no spec."""
    _found(spec)


def source_of(spec: str) -> str | None:
    """The name of the corpus plugin that reads a spec; ``None`` for files, folders and data sets of the hub."""
    path, name = Path(spec).expanduser(), spec.partition(":")[0]
    if path.is_file():
        return None
    if spec in BUILTINS["corpus"] or name == Demo.name:
        return name
    if path.is_dir():  # first, since a folder's name may hold @ and :, as a spec may
        return None
    is_plugin = name not in BUILTINS["corpus"] and NAME.fullmatch(name) and manager.is_name("corpus", name)
    return name if is_plugin else None


def _found(spec: str) -> Callable[[Role], Corpus]:
    """What reads a corpus; nothing is read or fetched yet."""
    path, (name, _, part) = Path(spec).expanduser(), spec.partition(":")
    if path.is_file():
        reader = _file_reader(path)
        return lambda role: _corpus(spec, path.name, reader(path))
    if name == Demo.name and part not in DEMO_CORPORA:
        raise UnknownNameError("demo corpus", f"demo:{part}", [f"demo:{known}" for known in DEMO_CORPORA])
    if source_of(spec) is not None:
        return lambda role: _from_source(spec, name, part, role)
    if spec and path.is_dir():
        return lambda role: _table(spec, _load_folder(path, None), None, None, role)
    return _dataset(spec)


def _from_source(spec: str, name: str, part: str, role: Role) -> Corpus:
    source: CorpusSource = manager.create("corpus", name)

    def read() -> Corpus:
        answer: Any = source.read(part or None, role)
        match answer:
            case (str() as split, Iterable() as documents) if not isinstance(documents, str | bytes):
                return _corpus(spec, split, _texts_of(source, documents))
        raise PluginError(
            f"{manager.described(source)}: read returned {reprlib.repr(answer)}, not what was read and its documents",
            hint='Return a pair: a text such as "train", and a list or generator of documents, each a str.',
        )

    return call_plugin(source, read, f"reading corpus {spec!r}")


def _texts_of(source: CorpusSource, documents: Iterable[Any]) -> Iterator[str]:
    """The documents, held to be text."""
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, str):
            raise PluginError(f"{manager.described(source)}: document {number} is {type(document).__name__}, not a str")
        yield document


def _corpus(name: str, split: str, documents: Iterable[str]) -> Corpus:
    """Collect documents up to ``ENOUGH_CHARACTERS``.

    Half a surrogate pair, as cut web text has it, is no text that a tokenizer takes: it becomes a question mark.
    """
    digest = hashlib.sha256()
    kept: list[str] = []
    characters = 0
    for document in documents:
        data = document[: ENOUGH_CHARACTERS - characters].encode("utf-8", errors="replace")
        digest.update(len(data).to_bytes(8, "little") + data)  # the length keeps ("ab", "c") apart from ("a", "bc")
        kept.append(data.decode("utf-8"))
        characters += len(kept[-1])
        if characters >= ENOUGH_CHARACTERS:
            break
    if not any(document.strip() for document in kept):
        raise DataError(f"corpus {name!r} ({split}) holds no text", hint="Name a corpus that is not empty.")
    return Corpus(name, split, tuple(kept), digest.hexdigest())


# --- the embedded default ---------------------------------------------------------------------------------------------


class Demo(CorpusSource):
    """The embedded default."""

    name = "demo"

    def read(self, part: str | None, role: Role) -> tuple[str, Iterable[str]]:
        """One of its four corpora, whatever the role."""
        text = _read_text(fetch(DEMO_TEXT) / f"{part}.utf8")
        parse = {"c4": _c4_documents, "wiki": _wiki_documents}.get(str(part))
        return f"{part}.utf8", parse(text) if parse else [text]


def _c4_documents(text: str) -> list[str]:
    """One document a line. Pages that appear twice are kept once: else a copy could sit in two splits."""
    return list(dict.fromkeys(line for line in text.split("\n") if line.strip()))


def _wiki_documents(text: str) -> list[str]:
    """The articles between ``<doc ...>`` and ``</doc>``, without those tags."""
    articles = (article.strip() for article in re.split(r"^(?:<doc\b[^\n]*>|</doc>)\s*$", text, flags=re.MULTILINE))
    return [article for article in articles if article]


# --- files ------------------------------------------------------------------------------------------------------------


def _file_reader(path: Path) -> Callable[[Path], Iterable[str]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"corpus file {str(path)!r} ends in {path.suffix!r}, which cannot be read",
            hint=f"Use a file that ends in one of {', '.join(READERS)}.",
        )
    return reader


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A file of text, without the mark that some editors begin UTF-8 with."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(
            f"corpus file {str(path)!r} is not UTF-8 text: {error.reason}",
            hint=f"Convert it: {CONVERT.format('LATIN1')}, or what it was written in.",
        ) from error
    except OSError as error:
        raise DataError(
            f"corpus file {str(path)!r} cannot be read: {error.strerror}", hint="Check the file."
        ) from error


def _read_text(path: Path) -> str:
    with _opened(path) as file:
        text = file.read(ENOUGH_CHARACTERS)
    if "\0" in text:
        raise DataError(
            f"corpus file {str(path)!r} holds NUL characters: it may be UTF-16, and is no UTF-8 text",
            hint=f"Convert it: {CONVERT.format('UTF-16LE')}.",
        )
    return text


def _read_jsonl(path: Path) -> Iterator[str]:
    """A text a line; lines whose text is null are skipped, as missing values of a table are."""
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of corpus file {str(path)!r}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # numbers and nesting beyond what Python reads, too
                why = f"{error.msg}: column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(
                    f"{where} is not JSON: {why}", hint='Write one object a line, like {"text": "..."}.'
                ) from error
            _check_column(where, row if isinstance(row, dict) else [])
            if not isinstance(row[COLUMN], str | None):
                raise DataError(
                    f"{where}: {COLUMN!r} is of type {type(row[COLUMN]).__name__}, not text",
                    hint='Write one object a line, like {"text": "..."}.',
                )
            if row[COLUMN] is not None:
                yield row[COLUMN]


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_column(f"corpus file {str(path)!r}", file.schema_arrow.names)
        for batch in file.iter_batches(columns=[COLUMN]):
            yield from _texts(batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _read_arrow(path: Path) -> Iterator[str]:
    """Both Arrow formats: the stream that ``datasets`` writes, and the file format with its footer."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            for batch in batches:
                _check_column(f"corpus file {str(path)!r}", batch.schema.names)
                yield from _texts(batch.column(COLUMN).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


READERS: dict[str, Callable[[Path], Iterable[str]]] = {
    ".txt": lambda path: [_read_text(path)],
    ".utf8": lambda path: [_read_text(path)],
    ".md": lambda path: [_read_text(path)],
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """Missing values are skipped."""
    return (value for value in values if isinstance(value, str))


def _check_column(where: str, columns: Iterable[str]) -> None:
    if COLUMN not in columns:
        raise DataError(
            f"{where} has no text column {COLUMN!r}; its columns: {', '.join(columns) or 'none'}",
            hint=f"Rename the column that holds the text to {COLUMN!r}.",
        )


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"corpus file {str(path)!r} is damaged or not what its name says: {error}", hint="Write or download it again."
    )


# --- datasets: folders and the hub ------------------------------------------------------------------------------------


class HubCorpus(CorpusSource):
    """A dataset on the hub that has a short name here.

    Attributes:
        path: hub id.
        subset: the dataset's configuration; ``None`` where ``files`` say what to read.
        reported: the split to report on; the other roles read ``train``.
        files: the file to read for a split, where the whole dataset would be far too large.
    """

    path: ClassVar[str]
    subset: ClassVar[str | None] = None
    reported: ClassVar[str]
    files: ClassVar[dict[str, str]] = {}

    def read(self, part: str | None, role: Role) -> tuple[str, Iterable[str]]:
        """The split of the role."""
        split = self.reported if role == "report" else "train"
        options: dict[str, Any] = {}
        if self.files:  # the dataset's card counts all its files; one shard never matches that
            options = {"data_files": {split: self.files[split]}, "verification_mode": "no_checks"}
        rows = _load_dataset(self.path, self.subset, **options)[split]
        return f"{self.files.get(split, self.subset)}, {split}", _column_texts(self.name, rows)


class Wikitext(HubCorpus):
    """WikiText-2."""

    name = "wikitext"
    path = "Salesforce/wikitext"
    subset = "wikitext-2-raw-v1"
    reported = "test"


class C4(HubCorpus):
    """The first English shards of C4."""

    name = "c4"
    path = "allenai/c4"
    reported = "validation"
    files: ClassVar[dict[str, str]] = {
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    }


def _dataset(spec: str) -> Callable[[Role], Corpus]:
    match = SPEC.fullmatch(spec)
    if match is None:
        raise DataError(
            f"corpus {spec!r} is not understood", hint="Write hub-id[:subset][@split], a file's path, or demo:c4."
        )
    name, subset, split = match["path"], match["subset"], match["split"]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return lambda role: _table(spec, _load_folder(folder, subset), subset, split, role)
    if folder.is_file():
        rest = spec.removeprefix(name)
        raise DataError(f"corpus file {name!r} has neither subsets nor splits", hint=f"Leave {rest!r} out.")
    is_file = folder.suffix.lower() in FILE_SUFFIXES
    if is_file or not is_hub_id(name):
        hint = f"{_guess(name)}Check the path, or name demo:c4."
        if "*" in name or "," in name:
            hint = f"A mixture is a list of names, each with a number as its weight or without one: {EXAMPLE}."
        raise DataError(f"corpus file or folder {name!r} does not exist", hint=hint)
    return lambda role: _table(spec, _load_dataset(name, subset), subset, split, role)


def _table(spec: str, parts: Any, subset: str | None, split: str | None, role: Role) -> Corpus:
    """The texts of one split of a dataset, or of a folder of files."""
    chosen, rows = _choose_split(spec, parts, split, role)
    texts = _file_texts(rows) if isinstance(rows, list) else _column_texts(spec, rows)
    return _corpus(spec, ", ".join(part for part in (subset, chosen) if part) or "all", texts)


def _load_folder(folder: Path, subset: str | None) -> Any:
    import datasets

    saved = (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()
    if not saved:
        return (subset is None and _files_by_split(folder)) or _load_dataset(str(folder), subset)
    if subset is not None:
        raise DataError(
            f"folder {str(folder)!r} was written by save_to_disk and has no subset {subset!r}",
            hint=f"Leave ':{subset}' out.",
        )
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from error


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder without a dataset card, if all can be read here: else none.

    `datasets` finds them, and tells splits by their names. It would make a document of every line of a .txt file, which
    is another text than that of the file itself, and read the files of the most frequent suffix only.
    """
    import datasets

    card = folder / "README.md"
    if card.is_file():
        with _opened(card) as file:
            if file.read(3) == "---":
                return {}
    try:
        found = datasets.load_dataset_builder("text", data_dir=str(folder)).config.data_files
    except (OSError, ValueError, datasets.exceptions.DatasetsError):
        return {}  # load_dataset says why
    files = {str(split): [Path(name) for name in names] for split, names in found.items()}
    return files if all(path.suffix.lower() in READERS for paths in files.values() for path in paths) else {}


def _file_texts(paths: Sequence[Path]) -> Iterator[str]:
    """A file at a time: of a large folder, only the first ones are ever opened."""
    for path in paths:
        yield from _file_reader(path)(path)


def _load_dataset(path: str, subset: str | None, **options: Any) -> Any:
    """All splits of one subset, by ``datasets.load_dataset``, which keeps what it downloads in its own cache."""
    import datasets

    if not Path(path).is_dir():
        _check_reachable(path)
    try:
        return datasets.load_dataset(path, subset, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        message = f"{path!r} is no file or folder here, and the hub has no dataset {path!r} (or it is private): {error}"
        raise DataError(message, hint=_hint(path)) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # ConnectionError is an OSError; an unknown subset and a folder without data files are ValueErrors or the like.
        if Path(path).is_dir():
            why = first_line(error.__cause__ or error)
            raise DataError(f"folder {path!r} cannot be loaded as text: {why}", hint=FOLDER_HINT) from error
        raise DataError(f"hub dataset {path!r} cannot be loaded: {error}", hint=_hint(path)) from error


def _check_reachable(name: str) -> None:
    """Refuse a data set that the hub cannot be asked for, unless it was loaded before.

    One short request finds out: `datasets` would ask for half a minute before it gives up.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    error = hub_error("dataset", name)
    if error is None or isinstance(error, HfHubHTTPError):  # what is wrong with the name, datasets says
        return
    try:
        datasets.load.CachedDatasetModuleFactory(name).get_module()
    except FileNotFoundError:
        raise DataError(
            f"corpus {name!r} is no file or folder here, and could not be loaded from the hub: it cannot be reached "
            f"({first_line(error)})",
            hint=_hint(name),
        ) from error


def _hint(name: str) -> str:
    """The corpus that may have been meant, and what needs no hub."""
    return manager.with_plugins(_guess(name) + OFFLINE_HINT, name)


def _guess(name: str) -> str:
    """The corpus or the file in the same folder that may have been meant, as the beginning of a hint."""
    folder = Path(name).expanduser().parent
    can_list = folder.is_dir() and os.access(folder, os.R_OK)
    files = [str(folder / file.name) for file in folder.iterdir()] if can_list else []
    known = [*manager.names("corpus"), *(f"{Demo.name}:{part}" for part in DEMO_CORPORA), *files]
    near = difflib.get_close_matches(str(Path(name).expanduser()), known, n=1)
    return f"Did you mean {near[0]!r}? " if near and near[0] != name else ""


def _choose_split(spec: str, parts: Any, split: str | None, role: Role) -> tuple[str | None, Any]:
    """The split that was named, else the role's usual one; a saved dataset without splits is taken whole."""
    import datasets

    if isinstance(parts, datasets.Dataset):
        if split is not None:
            raise DataError(f"corpus {spec!r} has no splits, so none called {split!r}", hint=f"Leave '@{split}' out.")
        return None, parts
    names = list(parts)
    if split is None:
        usual = ("test", "validation", "train") if role == "report" else ("train",)
        split = next((name for name in usual if name in names), names[0] if len(names) == 1 else None)
        if split is None:
            raise DataError(
                f"corpus {spec!r} has no split {usual[0]!r}; it has {', '.join(names)}",
                hint=f"Name one of them, like {spec}@{names[0]}.",
            )
    if split not in names:
        raise UnknownNameError(f"split of corpus {spec!r}:", split, names)
    return split, parts[split]


def _column_texts(spec: str, rows: Any) -> Iterator[str]:
    _check_column(f"corpus {spec!r}", rows.column_names)
    for batch in rows.select_columns([COLUMN]).iter(batch_size=1000):
        yield from _texts(batch[COLUMN])
