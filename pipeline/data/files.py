"""Reads the rows of data files: JSON lines, JSON, CSV, TSV and Parquet.

A file whose contents are of another format is an error. The message names the format, and says how to convert the file.
"""

import codecs
import csv
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from pipeline.config.hub_ids import DATA_SUFFIXES
from pipeline.data import json_rows
from pipeline.data.json_rows import Unreadable
from pipeline.errors import UserError
from pipeline.runs.foreign_files import describe_error, describe_irregular, parse_json

if TYPE_CHECKING:
    import pyarrow

PlacedRows = Iterator[tuple[str, object]]
"""Pairs of (place, row). Rows are counted from 1. In JSON lines, the number of a row is the number of its line."""

KINDS = f"a {', '.join(DATA_SUFFIXES[:-1])} or {DATA_SUFFIXES[-1]} file, a folder of such files, or a saved data set"
"""The kinds of data sets on this machine, for messages."""

MOST_ROW_BYTES = 1 << 24
"""Largest size of a row of JSON lines, or of a cell or a line of a table, in bytes. Larger ones are refused."""
MOST_JSON_BYTES = 1 << 29
"""Largest size of a .json file, in bytes. Such a file is read as a whole."""
_HEAD_BYTES = 1 << 12
_BATCH_BYTES = 1 << 29  # of Parquet, as an upper bound of what is decompressed at a time
_BATCH_ROWS = (4, 1024)  # least and most rows that are decompressed at a time
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_ONE_CONVERSATION = ("messages", "conversations")  # an object with such a list is a row, and not a list of rows
_ROW_LISTS = ("data", "rows", "examples", "samples", "records", "instances", "items")  # usual names of a list of rows
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words in the names of its files and lists, as in the library `datasets`."""
SPLIT_OF = {word: split for split, words in _SPLIT_NAMES.items() for word in words}
"""Word -> the split that it names."""
_ENCODINGS = {
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
}
"""First bytes of a text -> its encoding."""
_SAME_FORMAT = {
    **dict.fromkeys((".ndjson", ".jsonlines", ".jl"), ".jsonl"),
    **dict.fromkeys((".pq", ".parq"), ".parquet"),
}
"""Other suffixes of formats that the program reads -> the suffix that it reads."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a compressed file -> program that unpacks it."""


class TextRow(dict[str, str | None]):
    """A row of a CSV or TSV file. Its values are text, also if the text is a number."""


class ArrowRow(dict[str, object]):
    """A row of a Parquet file or of a saved or downloaded data set. Its objects may have keys that Arrow has added."""


def raise_if_other_format(key: str, path: Path) -> None:
    """Check by the name and the first bytes that a file has a format that `read_file` reads.

    Raises:
        UserError: the file has another format, or the wrong name for its format. The message says how to convert it.
    """
    suffix = path.suffix.lower()
    if (kind := describe_irregular(path)) is not None:
        raise UserError(f"{key}.path={path}: {kind}.")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    found = _describe_binary(path, suffix, head) or _describe_encoding(path, suffix, head)
    found = found or _describe_text(path, suffix, head)
    if found is None and suffix not in DATA_SUFFIXES:
        found = f"must be {KINDS}."
    if found is not None:
        raise UserError(f"{key}.path={path}: {found}")


def read_file(path: Path, split: str) -> PlacedRows:
    """Read the rows of a file. `split` chooses a list of a JSON file that holds several lists of rows.

    Raises:
        UserError: the file cannot be read. A row that cannot be read is returned as `Unreadable`.
    """
    if path.suffix.lower() == ".json":
        return _read_json(path, split)
    return _READERS[path.suffix.lower()](path)


def number_rows(where: str, rows: Iterable[object]) -> PlacedRows:
    """Give each row its place: `where`, and the number of the row."""
    return ((f"{where}: row {i}", row) for i, row in enumerate(rows, 1))


def _describe_binary(path: Path, suffix: str, head: bytes) -> str | None:
    """Describe a file of a binary format, except for a Parquet file with the right name."""
    quoted = shlex.quote(str(path))
    if head.startswith(b"PAR1") and suffix != ".parquet":
        return f"holds Parquet. Rename it: mv {quoted} {_free(path.with_suffix('.parquet'))}"
    for start, program in _COMPRESSED.items():
        if head.startswith(start):
            is_named = suffix not in DATA_SUFFIXES and Path(path.stem).suffix.lower() in DATA_SUFFIXES
            target = path.with_suffix("") if is_named else path.with_name(f"unpacked-{path.name}")
            return f"is compressed with {program}. Unpack it: {program} -dc {quoted} > {_free(target)}"
    if head.startswith(b"PK\x03\x04"):
        if suffix.startswith(".xls"):
            return "is an Excel file. Save it as CSV (UTF-8) in Excel, and give that file."
        return "is a zip archive. Unpack it, and give the file or the folder with the rows."
    if suffix == ".arrow" or head.startswith(b"ARROW1"):
        return f"is an Arrow file. Give the folder of the saved data set that it belongs to: {path.parent}"
    return None


def _describe_encoding(path: Path, suffix: str, head: bytes) -> str | None:
    """Describe a text file in UTF-16 or UTF-32, with a byte order mark or without it."""
    if suffix not in DATA_SUFFIXES or suffix == ".parquet":
        return None
    found = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)
    if found is None and b"\0" in head[:2]:  # the first character of rows is in ASCII
        found = "UTF-16BE" if head.startswith(b"\0") else "UTF-16LE"
    return None if found is None else f"is in {found}, not in UTF-8. Convert it: {_command(path, found)}"


def _not_in_utf8(path: Path, error: UnicodeDecodeError) -> str:
    return f"not in UTF-8 ({error}). If the file is in Latin-1, convert it ({_command(path, 'LATIN1')})"


def _command(path: Path, encoding: str) -> str:
    target = _free(path.with_name(f"utf8-{path.name}"))
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {target}"


def _describe_text(path: Path, suffix: str, head: bytes) -> str | None:
    """Describe a text file that is named as another format."""
    quoted = shlex.quote(str(path))
    if suffix in _SAME_FORMAT:
        target = path.with_suffix(_SAME_FORMAT[suffix])
        return f"must be named *{target.suffix}. Rename it: mv {quoted} {_free(target)}"
    if suffix != ".jsonl":
        return None
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    is_list = text.startswith(b"[") and text[1:].lstrip()[:1] in (b"{", b"")
    if not is_list and text.partition(b"\n")[0].strip() != b"{":
        return None
    what = "one JSON list" if is_list else "objects over several lines"
    target = path.with_suffix(".json")
    return f"holds {what}, not one object on each line. Rename it: mv {quoted} {_free(target)}"


def _free(target: Path) -> str:
    """Return the path for a shell, with a number if a file of that name exists: the command must not overwrite it."""
    numbered = (target.with_stem(f"{target.stem}-{i}") for i in count(2))
    return shlex.quote(str(next(path for path in chain([target], numbered) if not os.path.lexists(path))))


def _read_jsonl(path: Path) -> PlacedRows:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_ROW_BYTES + 1):
            number += 1
            if not line.strip():
                _skip_line(file, line)
                continue
            yield f"{path}: row {number}", _parse_line(path, file, line)


def _parse_line(path: Path, file: BinaryIO, line: bytes) -> object:
    if (size := len(line) + _skip_line(file, line)) > MOST_ROW_BYTES:
        return _too_large(size)
    try:
        return parse_json(line)
    except UnicodeDecodeError as error:
        return Unreadable(_not_in_utf8(path, error))
    except ValueError as error:
        return Unreadable(describe_error(error))


def _skip_line(file: BinaryIO, line: bytes) -> int:
    """Skip the rest of a line whose beginning was read. Returns the number of bytes that were skipped."""
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(MOST_ROW_BYTES)
        skipped += len(line)
    return skipped


def _read_json(path: Path, split: str) -> PlacedRows:
    """Read a list of rows, an object that holds such a list, or a sequence of objects. Lines are counted from 1."""
    if (size := path.stat().st_size) > MOST_JSON_BYTES:
        raise UserError(
            f"{path}: has {size:,} bytes. It is read as a whole, so {MOST_JSON_BYTES:,} is the limit. Save the"
            f" rows as JSON lines: jq -c '.[]' {shlex.quote(str(path))} > {_free(path.with_suffix('.jsonl'))}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        start = json_rows.skip_space(text, 0)
        is_list = text[start : start + 1] == "["
        if not is_list and start < len(text):
            value, end = json_rows.parse_marked_at(text, start)
            if isinstance(value, dict) and json_rows.skip_space(text, end) == len(text):
                yield from number_rows(str(path), map(json_rows.require_unique, _rows_in(path, value, split)))
                return
        has_lines, line, counted = "\n" in text.strip(), 1, 0
        for number, (position, row) in enumerate(
            (json_rows.elements if is_list else json_rows.sequence)(text, start), 1
        ):
            line, counted = line + text.count("\n", counted, position), position
            yield f"{path}: row {number}{f' (line {line})' if has_lines else ''}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_not_in_utf8(path, error)}.") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from error


def _rows_in(path: Path, value: Mapping[str, object], split: str) -> list[object]:
    """Return the rows in a JSON object: its list for `split`, or its only list. Without lists, the object is a row.

    Raises:
        UserError: the lists belong to other splits, or it is unclear whether the object is a row with a list.
    """
    lists = {name: found for name, found in value.items() if isinstance(found, list) and found}
    lists = {name: found for name, found in lists.items() if all(isinstance(row, dict) for row in found)}
    if not lists or set(lists) & set(_ONE_CONVERSATION):
        return [value]
    is_text = any(isinstance(found, str) for name, found in value.items() if name not in lists)
    if split in lists:
        return lists[split]
    if is_text and list(lists) == ["tools"]:
        return [value]
    chosen = [name for name in lists if SPLIT_OF.get(name) == SPLIT_OF.get(split, split)]
    if len(lists) == 1 and not set(lists) & set(SPLIT_OF):
        chosen = [name for name in lists if name in _ROW_LISTS or not is_text]
        if not chosen:
            raise UserError(
                f"{path}: holds one object with text and the list {', '.join(lists)}. If the list holds the rows,"
                f" rename the list to {split}. If the object is one row, put it in brackets: [{{…}}]."
            )
    if len(chosen) != 1:
        if len(lists) == 1:
            raise UserError(f"{path}: holds the list {', '.join(lists)}, which is not the split {split!r}.")
        raise UserError(f"{path}: holds the lists {', '.join(lists)}, and none of them is the split {split!r}.")
    return lists[chosen[0]]


def _read_csv(path: Path) -> PlacedRows:
    """Read a table with one header row. Each value is text. An empty cell is null. Lines are counted from 1."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(MOST_ROW_BYTES)  # the default refuses cells of more than 128 KiB
    try:
        # newline="" leaves line breaks in cells as they are. utf-8-sig drops the byte order mark that Excel writes.
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _csv_lines(path, csv.reader(_short_lines(path, file), delimiter=separator, strict=True))
            _, names = next(lines, (0, []))
            _check_header(path, names, separator)
            for number, (line, cells) in enumerate(lines, 1):
                row = TextRow(zip(names, (cell or None for cell in cells), strict=False))
                is_whole = len(cells) == len(names)
                yield f"{path}: row {number} (line {line})", row if is_whole else _wrong_count(cells, names, separator)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_not_in_utf8(path, error)}.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error


def _short_lines(path: Path, file: TextIO) -> Iterator[str]:
    """Yield the lines of a table.

    Raises:
        UserError: a line is too long.
    """
    number = 0
    while line := file.readline(MOST_ROW_BYTES + 1):
        number += 1
        if len(line) > MOST_ROW_BYTES:
            raise UserError(f"{path}: line {number} has more than {MOST_ROW_BYTES:,} characters.")
        yield line


def _csv_lines(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first line, cells) for each row that is not an empty line.

    Raises:
        UserError: the last quoted cell is not closed, or text follows a closing quote.
    """
    first = 1
    try:
        for cells in reader:
            if cells:
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        if "field larger" in str(error):
            raise UserError(
                f"{path}: the row that begins in line {first} has a cell of more than {MOST_ROW_BYTES:,} characters. Is"
                " a quote not closed?"
            ) from error
        raise UserError(
            f"{path}: the row that begins in line {first} has a wrong quote ({error}, line {reader.line_num}). Put"
            ' quotes around a cell that begins with a quote, and double each quote in it, as in """Yes"", she said".'
        ) from error


def _wrong_count(cells: list[str], names: list[str], separator: str) -> Unreadable:
    return Unreadable(
        f"has {len(cells)} cells, but the header has {len(names)}. Put quotes around cells that contain"
        f" {_SEPARATORS[separator]} or line breaks"
    )


def _check_header(path: Path, names: list[str], separator: str) -> None:
    """Check the names of the columns of a CSV or TSV file.

    Raises:
        UserError: two columns have the same name, or the file has another separator.
    """
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise UserError(f"{path}: the header has the column {twice[0]!r:.100} twice. Rename one of them.")
    other = next((sign for sign in _SEPARATORS if sign in "".join(names) and sign != separator), None)
    if len(names) == 1 and other is not None:
        raise UserError(
            f"{path}: the header has only the column {names[0]!r}. The columns of a {path.suffix} file are separated by"
            f" {_SEPARATORS[separator]}, not by {_SEPARATORS[other]}."
        )


def _read_parquet(path: Path) -> PlacedRows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        # A small file can hold large rows: each row can have the size of its whole group, which is compressed.
        groups = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
        count = min(_BATCH_ROWS[1], max(_BATCH_ROWS[0], _BATCH_BYTES // max(1, *groups, 1)))
        yield from number_rows(str(path), (row for batch in table.iter_batches(count) for row in _rows_of(batch)))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}). Fetch it again.") from error


def _rows_of(batch: "pyarrow.RecordBatch") -> Iterator[object]:
    if batch.nbytes <= MOST_ROW_BYTES:
        yield from map(ArrowRow, batch.to_pylist())
        return
    for i in range(len(batch)):
        row = batch.slice(i, 1)
        yield _too_large(row.nbytes) if row.nbytes > MOST_ROW_BYTES else ArrowRow(row.to_pylist()[0])


def _too_large(size: int) -> Unreadable:
    return Unreadable(f"has {size:,} bytes. A row has at most {MOST_ROW_BYTES:,}. Shorten it, or remove it")


_READERS: dict[str, Callable[[Path], PlacedRows]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
