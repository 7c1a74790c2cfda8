"""
The documents of a file: a column of a .parquet, a field of each line of a .jsonl, or a .txt; and what is wrong with it.

Each reader yields them from a row on, None for a row without one, so that an interrupted build resumes where it was.
Only a .txt is in memory as a whole.
"""

import io
import itertools
import json
import re
from pathlib import Path

from lib.console import UserError, say
from lib.data.demo import demo_documents
from lib.tokenizer import pieces

SUFFIX = re.compile(r"\.(parquet|(jsonl?|txt)(\.gz|\.zst)?)\Z", re.I)
FORMATS = ".parquet, .jsonl, .json (one object per line) and .txt, the last three also as .gz or .zst"
MARK = "<|endoftext|>"  # separates the documents in many a .txt
DECODER = json.JSONDecoder(parse_int=float)  # int() refuses 5,000 digits; numbers are not needed


class More(str):
    """A text that continues the document before it."""


def format_of(name):
    """ "parquet", "jsonl", "json" or "txt" by a file's name; None if there is no reader for it."""
    match = SUFFIX.search(name)
    return match and (match[2] or match[1]).lower()


def table_documents(path, column, row):
    """One column of a .parquet from a row on. Row groups before it are skipped; one batch is in memory at a time."""
    import pyarrow.parquet

    # pyarrow would otherwise read all row groups ahead, 2 GB of a file of FineWeb-Edu
    with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
        names, groups = table.schema_arrow.names, table.num_row_groups
        if column not in names:
            say(f'{path} has no "{column}" column, only {names}: its rows count as empty documents')
            yield from itertools.repeat(None, table.metadata.num_rows - row)
            return
        first = 0
        while first < groups and row >= (rows := table.metadata.row_group(first).num_rows):
            first, row = first + 1, row - rows
        for batch in table.iter_batches(256, row_groups=range(first, groups), columns=[column]):
            yield from batch.column(0).to_pylist()[row:]
            row = max(0, row - len(batch))


def open_text(path):
    """Open a file of text for reading bytes, decompressed if its name ends in .gz or .zst."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    if not compression:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(open(path, "rb"), compression=compression), 1 << 20)


def line_documents(path, column, row):
    """One field of each line of a .jsonl from a line on; a blank line and one without the field are empty documents."""
    with open_text(path) as lines:
        for number, line in enumerate(itertools.islice(lines, row, None), start=row + 1):
            try:
                record = DECODER.decode(line.decode("utf-8-sig")) if line.strip() else {}
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}; fix or delete it") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number} is not a JSON object: convert a list with jq -c '.[]'")
            yield record.get(column)


def read_text(path):
    """The bytes of a .txt, without a byte order mark, and with \\n at the ends of lines."""
    with open_text(path) as file:
        return file.read().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")


def text_documents(path, split_on):
    """The documents of a .txt, a single one unless split_on is given, without the newlines around a separator. A long
    one comes in pieces, which are tokenized in parallel."""
    content = read_text(path)  # bytes: a str may be four times as large
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-LFS pointer to the text: run git lfs pull in its folder first")
    if content.count(b"\0") > len(content) // 100:  # much of UTF-16 is valid UTF-8
        raise UserError(f"{path} is not UTF-8 but looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW")
    texts = [text.strip(b"\n") for text in content.split(split_on.encode())] if split_on else [content]
    if split_on and not texts[-1]:  # after a separator at the end
        texts.pop()
    for text in texts:
        for number, piece in enumerate(pieces(text.decode())):
            yield More(piece) if number else piece


def documents_of(path, column="text", row=0, split_on=None):
    """The documents of a file from a row on, long ones in pieces, of type More after the first; without a path, those
    of the demo. The rows of a .txt are its pieces."""
    if path is None:
        yield from demo_documents()[row:]
        return
    kind = format_of(path.name)
    try:
        if kind == "txt":
            yield from itertools.islice(text_documents(path, split_on), row, None)
            return
        values = (table_documents if kind == "parquet" else line_documents)(path, column, row)
        for number, text in enumerate(values, start=row + 1):
            if isinstance(text, bytes):  # old writers of .parquet do not mark text as such
                text = text.decode()  # noqa: PLW2901
            if not isinstance(text, str | None):
                raise UserError(f'{path}, row {number}: "{column}" is not text but {text!r:.200}')
            yield text
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}. Convert it, for example with iconv") from None
    except (OSError, ValueError, KeyError) as error:  # pyarrow's are among them
        raise UserError(f"cannot read {path}: {error}") from None


def records_of(path):
    """The rows of a .parquet or the items of a JSON list, as dicts, or else the lines of a text."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"PAR1"):
            from pyarrow import BufferReader, parquet

            return parquet.read_table(BufferReader(content)).to_pylist()
        content = content.removeprefix(b"\xef\xbb\xbf")
        return json.loads(content) if content.lstrip().startswith(b"[") else map(bytes.strip, content.split(b"\n"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def inspect(path, column, split_on):
    """Read a file without tokenizing it; returns (whether it has text, whether the separator occurs in it, why it
    cannot be used or "")."""
    texts = (bool(text) for text in documents_of(path, column, 0, split_on))
    try:
        # a .parquet may be large: one document is enough
        has_text = any(texts) if format_of(path.name) == "parquet" else sum(texts) > 0
        return has_text, format_of(path.name) == "txt" and split_on.encode() in read_text(path), ""
    except UserError as error:
        return False, False, str(error)


def check_texts(paths, column, split_on, pool):
    """Read all local files before anything is built. Raises UserError that names all that cannot be used, or if there
    is no text, or the separator never occurs."""
    how = map(itertools.repeat, (column, split_on or MARK))
    found = pool.map(inspect, paths, *how, chunksize=1 + len(paths) // 256)
    have_text, have_separator, faults = zip(*found, strict=True)
    if faults := [fault for fault in faults if fault]:
        shown = "\n  ".join(faults[:20] + ["..."] * (len(faults) > 20))
        raise UserError(f"{len(faults):,} of {len(paths):,} files cannot be used:\n  {shown}")
    if not any(have_text):
        raise UserError(f'no file has text, or none has it in "{column}": choose another --text_column')
    if split_on and not any(have_separator):
        raise UserError(f"--split_on {split_on!r} never occurs in a .txt: check its spelling")
    if any(have_separator) and not split_on:
        say(f'{MARK} occurs in a .txt and is kept as text: with --split_on "{MARK}" a document ends there')
