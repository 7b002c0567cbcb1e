"""DATASET: from a Hub name or local files to rows, one document each."""

from __future__ import annotations

import gzip
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError, UserError
from .paths import expanded

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
MESSAGES = "messages"

Row = dict[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True)
class TextSource:
    """A DATASET as written: local files, or a data set on the Hub as `name[@revision][:config[:split]]`."""

    spec: str
    files: tuple[Path, ...] = ()
    name: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, spec: str, flag: str = "--dataset") -> TextSource:
        """Raises UserError for files that are missing or of an unknown kind, UsageError for a spec that says
        nothing; they name `flag`."""
        parts = [part.strip() for part in spec.split(",") if part.strip()]
        if not parts:
            raise UsageError(f"{flag} is empty; give a Hub name (name[@revision][:config[:split]]) or local files")
        if len(parts) == 1 and not _is_local(parts[0]):
            name, _, rest = parts[0].partition(":")
            config, _, split = rest.partition(":")
            name, _, revision = name.partition("@")
            return cls(spec, name=name, config=config or None, split=split or None, revision=revision or None)
        files = tuple(expanded(part) for part in parts)
        for file in files:
            _check_file(file, flag)
        return cls(spec, files=files)

    def each(self) -> list[TextSource]:
        """One source for each file."""
        return [TextSource(str(file), (file,)) for file in self.files] or [self]


def _is_local(part: str) -> bool:
    return part.endswith(SUFFIXES) or part.startswith((".", "/", "~")) or Path(part).exists()


def _check_file(file: Path, flag: str) -> None:
    if not file.exists():
        raise UserError(f"{flag}: there is no file {file}; check the path (a Hub name has no comma and no suffix)")
    if file.is_dir():
        raise UserError(f"{flag}: {file} is a folder; name its files ({', '.join(SUFFIXES)}), separated by commas")
    if not file.is_file():
        raise UserError(f"{flag}: {file} is no plain file (a pipe or a device?); give one of {', '.join(SUFFIXES)}")
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"{flag}: {file} is of an unknown kind; there are {', '.join(SUFFIXES)}")


def load_rows(spec: str | TextSource, *, text_field: str = "text", streaming: bool = False) -> Rows | Iterable[Row]:
    """The documents of a data set, in its order: rows with `text_field`, or with `messages` for
    conversations.

    Local files need no `datasets` package and are held in memory; a .txt file is one document. Only a Hub
    data set with `streaming` gives an iterable instead of a sequence.

    Raises:
        UserError: missing file, unknown field (naming those that exist), malformed line (naming it), or no
        rows.
    """
    source = TextSource.parse(spec) if isinstance(spec, str) else spec
    if source.name is not None:
        return _from_hub(source, text_field, streaming)
    rows = _Joined([_read_file(file, text_field) for file in source.files])
    if not len(rows):
        raise UserError(f"--dataset: {source.spec} is empty: it has no rows")
    return rows


class _Joined(Sequence):
    """Several sequences of rows as one."""

    def __init__(self, parts: list[Rows]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends: list[int] = []
        for part in self.parts:
            self.ends.append((self.ends[-1] if self.ends else 0) + len(part))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


def _read_file(file: Path, text_field: str) -> Rows:
    try:
        if file.name.endswith(".txt"):
            text = file.read_text(encoding="utf-8")
            return [{text_field: text}] if text.strip() else []
        if file.name.endswith(".parquet"):
            return _Column(file, text_field)
        return list(_read_lines(file, text_field))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is truncated or no gzip file ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _read_lines(file: Path, text_field: str) -> Iterator[Row]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not a JSON object ({error}); repair or remove the line") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: a JSON object is needed on each line, not {type(row).__name__}")
            field = field_of(row, text_field, where)
            yield {field: row[field]}


class _Column(Sequence):
    """The rows of a parquet file with the one column that is read, held as Arrow."""

    def __init__(self, file: Path, text_field: str) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise UserError(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from error
        try:
            opened = parquet.ParquetFile(file)
            names = opened.schema_arrow.names
        except (ValueError, OSError, NotImplementedError) as error:  # pyarrow's own errors are of these
            raise UserError(f"{file} is truncated or no parquet file ({error}); download it again") from error
        self.file, self.field = file, field_of(dict.fromkeys(names), text_field, str(file), typed=False)
        try:
            self.column = opened.read(columns=[self.field]).column(0)
        except (ValueError, OSError, NotImplementedError) as error:
            raise UserError(f"{file} is damaged ({error}); download it again") from error

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        try:
            return {self.field: self.column[index].as_py()}
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file}, row {index}: not UTF-8 text ({error}); download it again") from error


def field_of(row: Row, text_field: str, where: str, *, typed: bool = True) -> str:
    """The field of a row that is read: `messages` if there are any and no other field was asked for.

    Raises UserError, naming the fields there are, when it is missing, and with `typed` when it is not text.
    """
    if MESSAGES in row and (text_field not in row or text_field == "text"):
        return MESSAGES
    if text_field not in row:
        raise UserError(
            f"{where} has no field {text_field!r}; it has: {', '.join(row) or 'none'}; "
            "name the text's field with --text-field"
        )
    text = row[text_field]
    if typed and isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell what is no text
            raise UserError(f"{where}: the field {text_field!r} is no text ({error}); repair or remove it") from error
    elif typed and text is not None:
        raise UserError(
            f"{where}: the field {text_field!r} is {type(row[text_field]).__name__}, not text; "
            "name the text's field with --text-field"
        )
    return text_field


def _from_hub(source: TextSource, text_field: str, streaming: bool) -> Rows | Iterable[Row]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--dataset: {source.spec} is no local file, and data sets of the Hub need: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(
            source.name, source.config, split=source.split or "train", revision=source.revision, streaming=streaming
        )
        first = next(iter(rows), None)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(
            f"--dataset: {source.spec} is no local file, and cannot be had from the Hub either: {line} "
            "(a Hub name is name[@revision][:config[:split]])"
        ) from error
    if first is None:
        raise UserError(f"--dataset: {source.spec} is empty: it has no rows")
    field_of(first, text_field, f"--dataset: {source.spec}")
    return rows
