"""
What fineweb.py reads: the demo corpus, local files of text, and data sets of the Hugging Face hub.

A source is a list of files in a fixed order. Each gives its documents as str from a row on, None where a row has none,
so that a build that was interrupted goes on where it was.
"""

import ast
import contextlib
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import random
import re
import sys
import sysconfig
import zlib
from pathlib import Path

import numpy as np

from lib.console import UserError
from lib.data import hub
from lib.files import sample_hash

TEXT_SUFFIXES = (".parquet", *(text + zipped for text in (".jsonl", ".txt") for zipped in ("", ".gz", ".zst")))


def demo_documents():
    """The manual pages and docstrings that are installed with Python and NumPy, shuffled with a fixed seed."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    numpy_folder = importlib.util.find_spec("numpy").submodule_search_locations[0]
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(numpy_folder)):
        for path in sorted(folder.rglob("*.py")):
            if {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(folder).parts):
                continue
            with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # Python ships a few files broken on purpose
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                        texts.append(ast.get_docstring(node) or "")
    # one-liners teach little; a docstring inherited by copying must not stand in both splits
    texts = list(dict.fromkeys(text for text in texts if len(text) >= 200))
    random.Random(1337).shuffle(texts)
    return texts


def table_documents(path, column, row):
    """One column of a .parquet from a row on. Row groups before it are not read; memory holds a batch at a time."""
    import pyarrow.parquet

    # pyarrow would read all row groups ahead, 2 GB of a file of FineWeb-Edu
    with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:
        names, groups = table.schema_arrow.names, table.num_row_groups
        if column not in names:
            raise UserError(f'{path} has no "{column}" column: choose --text_column from its columns, {names}')
        kind = str(table.schema_arrow.field(column).type)
        if kind not in ("string", "large_string", "string_view"):
            raise UserError(f'column "{column}" of {path} holds {kind}, not text: choose --text_column from {names}')
        first = 0
        while first < groups and row >= (rows := table.metadata.row_group(first).num_rows):
            first, row = first + 1, row - rows
        for batch in table.iter_batches(256, row_groups=range(first, groups), columns=[column]):
            yield from batch.column(0).to_pylist()[row:]
            row = max(0, row - len(batch))


def open_text(path):
    """Open a file of text for reading bytes, decompressed where it ends in .gz or .zst."""
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20)
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def line_documents(path, column, row):
    """One field of each line of a .jsonl from a line on; a blank line is an empty document."""
    with open_text(path) as lines:
        for number, line in enumerate(itertools.islice(lines, row, None), start=row + 1):
            try:
                text = json.loads(line.decode("utf-8-sig"))[column] if line.strip() else None
                if not isinstance(text, str | None):
                    raise TypeError(text)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f'{path}, line {number} has no "{column}" string: {error!r:.200}; mend or delete it and '
                    "build it in a new --out, or name another --text_column"
                ) from None
            yield text


def documents_of(path, column="text", row=0):
    """The documents of a .parquet, .jsonl or .txt (which is one) from a row on; without a path, those of the demo."""
    try:
        if path is None:
            yield from demo_documents()[row:]
            return
        if path.name.endswith((".txt", ".txt.gz", ".txt.zst")):
            with open_text(path) as file:
                yield from [file.read().decode("utf-8-sig")][row:]
        else:
            yield from (table_documents if path.suffix == ".parquet" else line_documents)(path, column, row)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: convert it, for instance with iconv") from None
    except UserError:
        raise
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:  # pyarrow's are among them
        raise UserError(f"cannot read {path}: {error}") from None


def find_source(source, name=None, split="train", text_column="text", revision=None):
    """Return (what the manifest says of the source, a function that opens it), without a look at the network.

    open(folder, commit, keep) returns (commit, files, paths); paths(first) gives (index, path) of the files from one
    on. A data set is opened at the commit if there is one, and downloads into the folder, where `keep` leaves them.
    """
    path = Path(source)
    if (source == "demo" or path.exists()) and (name or revision):
        raise UserError(f"--name and --revision are for data sets on the hub, {source} is none: leave them out")
    if source == "demo":
        about = {"source": "demo", "revision": f"Python {sys.version.split()[0]}, NumPy {np.__version__}"}
        files = [{"file": "demo", "tokens": 1_000_000}]
        return about, lambda folder, commit, keep: (None, files, lambda first: [(0, None)][first:])
    if path.exists():
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        paths = [p for p in found if p.name.endswith(TEXT_SUFFIXES) and not p.is_dir()]
        if not paths:
            raise UserError(f"{source} holds no file that ends in {', '.join(TEXT_SUFFIXES)}")
        samples = hashlib.sha256(repr([(p.name, sample_hash(p)) for p in paths]).encode()).hexdigest()
        files = [{"file": p.name, "size": p.stat().st_size} for p in paths]
        about = {"source": str(path.resolve()), "revision": samples, "text_column": text_column}
        return about, lambda folder, commit, keep: (None, files, lambda first: list(enumerate(paths))[first:])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.endswith(TEXT_SUFFIXES):
        raise UserError(
            f"no file or folder {source}; a Hugging Face data set is written owner/name, like {hub.FINEWEB_EDU}"
        )
    if source in (hub.FINEWEB_EDU, "HuggingFaceFW/fineweb"):
        name = name or "sample-10BT"  # the whole is thousands of times as much
    revision = revision or (hub.FINEWEB_EDU_REVISION if source == hub.FINEWEB_EDU else "main")

    def open_source(folder, commit, keep):
        commit, files = hub.list_files(source, commit or revision, name, split)
        return commit, files, lambda first: hub.fetch_in_turn(source, commit, files, folder, first, keep)

    return dict(source=source, name=name, split=split, asked_revision=revision, text_column=text_column), open_source
