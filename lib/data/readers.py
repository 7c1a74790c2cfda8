"""
The documents of a file: a column of a .parquet, a field of each line of a .jsonl, or a .txt.

Each reader yields them from a row on, None for a row without one, so that an interrupted build resumes where it was.
Only a small part of the file is in memory at a time.
"""

import functools
import gzip
import io
import itertools
import json
import re
import zlib

from lib.console import UserError, say
from lib.data.demo import demo_documents

SUFFIX = re.compile(r"\.(parquet|(jsonl?|txt)(\.gz|\.zst)?)\Z", re.I)
FORMATS = ".parquet, .jsonl, .json (one object per line) and .txt, the last three also as .gz or .zst"
PIECE = 1 << 20  # characters of a .txt that are tokenized together
MARK = "<|endoftext|>"  # separates the documents in many a .txt
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# pyarrow's names of types that hold text; old writers of .parquet do not mark their bytes as UTF-8
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
DECODER = json.JSONDecoder(parse_int=float)  # int() refuses 5,000 digits; numbers are not needed


class More(str):
    """A text that continues the document before it."""


def format_of(name):
    """ "parquet", "jsonl", "json" or "txt" by a file's name; None if there is no reader for it."""
    match = SUFFIX.search(name)
    return match and (match[2] or match[1]).lower()


def count_files(files):
    return "1 file" if len(files) == 1 else f"{len(files):,} files"


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
        kind = table.schema_arrow.field(column).type
        kind = str(getattr(kind, "value_type", kind) if pyarrow.types.is_dictionary(kind) else kind)
        if kind not in TEXT_TYPES:
            raise UserError(f'column "{column}" of {path} holds {kind}, not text: choose --text_column from {names}')
        first = 0
        while first < groups and row >= (rows := table.metadata.row_group(first).num_rows):
            first, row = first + 1, row - rows
        for batch in table.iter_batches(256, row_groups=range(first, groups), columns=[column]):
            texts = batch.column(0).to_pylist()[row:]
            yield from [text.decode() if isinstance(text, bytes) else text for text in texts]
            row = max(0, row - len(batch))


def open_text(path):
    """Open a file of text for reading bytes, decompressed if its name ends in .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
    return gzip.open(path) if suffix == ".gz" else open(path, "rb")


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
            text = record.get(column)
            if not isinstance(text, str | None):
                raise UserError(f'{path}, line {number}: "{column}" is not text but {text!r:.200}; fix or delete it')
            yield text


def blocks(path):
    """The lines of a .txt, joined to blocks, with \\n line ends. Raises UserError if it is not UTF-8."""
    with io.TextIOWrapper(open_text(path), encoding="utf-8-sig", newline="\n") as file:
        try:
            while block := "".join(file.readlines(PIECE)):
                if block.count("\0") > len(block) // 100:
                    raise UserError(f"{path} looks like UTF-16; convert it: iconv -f UTF-16LE -t UTF-8")
                yield block.replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            near = error.object[max(0, error.start - 30) : error.start + 10]
            raise UserError(f"{path} is not UTF-8 near {near}: convert it, for instance with iconv") from None


@functools.cache  # printed once
def offer_to_split():
    say(f'{MARK} occurs in a .txt and is kept as text: with --split_on "{MARK}" a document ends there')


def text_documents(path, split_on):
    """The documents of a .txt, a single one unless split_on is given, without the newlines around a separator. A long
    one comes in pieces that begin with white space, which changes no token."""
    kind, rest = str, ""
    for block in blocks(path):
        rest += block
        if split_on:
            *whole, rest = rest.split(split_on)
            for text in whole:
                yield kind(text.rstrip("\n") if kind is More else text.strip("\n"))
                kind = str
            rest = rest.lstrip("\n") if kind is str else rest
        elif MARK in block:
            offer_to_split()
        words = rest[: len(rest) - len(split_on or "")].rsplit(None, 1)  # a separator may have begun
        if len(words) == 2:
            yield kind(words[0])
            kind, rest = More, rest[len(words[0]) :]
    rest = rest.rstrip("\n") if split_on else rest
    if rest or kind is str and not split_on:
        yield kind(rest)


def documents_of(path, column="text", row=0, split_on=None):
    """The documents of a file from a row on, long ones in pieces, of type More after the first; without a path, those
    of the demo. The rows of a .txt are its pieces."""
    if path is None:
        yield from demo_documents()[row:]
        return
    try:
        if format_of(path.name) == "txt":
            yield from itertools.islice(text_documents(path, split_on), row, None)
        else:
            yield from (table_documents if format_of(path.name) == "parquet" else line_documents)(path, column, row)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f'column "{column}" of {path} has bytes that are not UTF-8: {error}') from None
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:  # pyarrow's are among them
        raise UserError(f"cannot read {path}: {error}") from None


def inspect(path, column, split_on):
    """Read a file without tokenizing it; returns (how many documents with text it has, why it cannot be used or "", the
    columns of a .parquet, of which only the schema is read: if it has the column, it counts as a document)."""
    try:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                return 0, f"{path} is only a git-LFS pointer to the text: run git lfs pull in its folder first", []
        if format_of(path.name) == "parquet":
            import pyarrow.parquet

            names = pyarrow.parquet.read_schema(path).names
            if column in names:
                next(documents_of(path, column), None)
            return int(column in names), "", names
        texts = documents_of(path, column, 0, split_on or MARK)  # with a separator: the parent offers to split
        return sum(bool(text) and not isinstance(text, More) for text in texts), "", []
    except (UserError, OSError, ValueError) as error:  # pyarrow's are among them
        return 0, str(error) if isinstance(error, UserError) else f"cannot read {path}: {error}", []
