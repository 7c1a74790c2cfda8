"""The demo corpus: text that ships with Python and NumPy."""

import ast
import contextlib
import random
import sysconfig
from pathlib import Path

import numpy as np


def demo_documents():
    """The manual pages and docstrings that are installed with Python and NumPy, shuffled with a fixed seed."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(np.__file__).parent):
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
