"""
The documents of a file: a column of a .parquet, a field of each line of a .jsonl, or a .txt.

Each reader yields them from a row on, None for a row without one, so that an interrupted build resumes where it was.
Only a small part of the file is in memory at a time.
"""

import codecs
import functools
import gzip
import io
import itertools
import json
import re
import zlib

from lib.console import UserError, say
from lib.data.demo import demo_documents
from lib.tokenizer import LONGEST_WORD, cut

SUFFIX = re.compile(r"\.(parquet|(jsonl?|txt)(\.gz|\.zst)?)\Z", re.I)
FORMATS = ".parquet, .jsonl, .json (one object a line) and .txt, the last three also as .gz or .zst"
PIECE = 1 << 20  # characters of a .txt that are tokenized together
MARK = "<|endoftext|>"  # separates the documents in many a .txt
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# pyarrow's names of types that hold text; old writers of .parquet do not mark their bytes as UTF-8
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
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
            raise UserError(f'{path} has no "{column}" column: choose --text_column from its columns, {names}')
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
    """One field of each line of a .jsonl from a line on; a blank line is an empty document."""
    with open_text(path) as lines:
        for number, line in enumerate(itertools.islice(lines, row, None), start=row + 1):
            try:
                text = DECODER.decode(line.decode("utf-8-sig"))[column] if line.strip() else None
                if not isinstance(text, str | None):
                    raise TypeError(text)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                remedy = "fix or delete it and build it in a new --out, or name another --text_column"
                if line.strip().startswith(b"["):
                    remedy = "a line must be one JSON object: convert a list with jq -c '.[]'"
                raise UserError(f'{path}, line {number} has no "{column}" string: {error!r:.200}; {remedy}') from None
            yield text


def decoded(path):
    """The text of a .txt in blocks, with \\n line ends. Raises UserError if it is not UTF-8."""
    decoder, at, carry = codecs.getincrementaldecoder("utf-8")(), 0, ""
    with open_text(path) as file:
        while True:
            data = file.read(PIECE)
            waiting = len(decoder.getstate()[0])  # bytes of an incomplete character
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at += error.start - waiting
                raise UserError(f"{path} is not UTF-8 at byte {at}: convert it, for instance with iconv") from None
            if at == 0:
                text = text.removeprefix("\ufeff")
                if text.count("\0") > len(text) // 100:
                    raise UserError(f"{path} is full of NUL characters, as UTF-16 is: convert it, iconv -f UTF-16LE")
            at += len(data)
            text = carry + text
            carry = "\r" if data and text.endswith("\r") else ""  # the next block may begin with its \n
            yield text.removesuffix(carry).replace("\r\n", "\n")
            if not data:
                return


@functools.cache  # said once
def offer_to_split():
    say(f'{MARK} occurs in a .txt and is kept as text: with --split_on "{MARK}" a document ends there')


def text_documents(path, split_on):
    """The documents of a .txt, a single one unless split_on is given, in pieces that do not change the tokens."""
    kind, rest = str, ""
    for block in itertools.chain(decoded(path), [None]):
        rest += block or ""
        if split_on:
            *whole, rest = rest.split(split_on)
            for text in whole:
                text = text.lstrip("\n") if kind is str else text
                yield kind(text.rstrip("\n"))
                kind = str
            rest = rest.lstrip("\n") if kind is str else rest
        elif block and MARK in block:
            offer_to_split()
        limit = min(len(rest) - len(split_on or ""), LONGEST_WORD)  # a separator may have begun
        if block is not None and limit >= PIECE:
            end = cut(rest, 0, limit)
            if end < limit or limit == LONGEST_WORD:
                yield kind(rest[:end])
                kind, rest = More, rest[end:]
    rest = rest.rstrip("\n") if split_on else rest
    if rest or not split_on:
        yield kind(rest)


def documents_of(path, column="text", row=0, split_on=None):
    """The documents of a file from a row on, long ones in pieces, of type More after the first; without a path, those
    of the demo. The rows of a .txt are its pieces."""
    try:
        if path is None:
            yield from demo_documents()[row:]
        elif format_of(path.name) == "txt":
            yield from itertools.islice(text_documents(path, split_on), row, None)
        else:
            yield from (table_documents if format_of(path.name) == "parquet" else line_documents)(path, column, row)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f'column "{column}" of {path} has bytes that are not UTF-8: {error}') from None
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:  # pyarrow's are among them
        remedy = f": unpack it, zstd -d --long=31 {path}" if "too much memory" in str(error) else ""
        raise UserError(f"cannot read {path}: {error}{remedy}") from None
