"""
The GPT-2 BPE, which every script uses.
"""

import functools
import re

import numpy as np

from lib.console import UserError
from lib.files import ROOT

EOT = 50256  # <|endoftext|>, the one special token of GPT-2, and the last
VOCAB_SIZE = EOT + 1  # tokens; a model may have more ids, which only pad its matrices
# \s in tiktoken; Python's has four characters more
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
LONG = 500_000  # characters of white space; tiktoken fails on a run of 1,000,000
LONG_RUN = re.compile(f"[{WHITE_SPACE}]{{{LONG},}}")
LONGEST_WORD = 1 << 22  # characters: 2 s and 200 MB; four times the time and five times the memory for a word of 30 MB


@functools.cache
def get_tokenizer():
    """The GPT-2 BPE as a tiktoken.Encoding, from assets/: tiktoken itself downloads it, and clusters are offline."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext.openai_public import r50k_pat_str

    class Encoding(tiktoken.Encoding):
        def encode_ordinary(self, text):
            return encode(text).tolist()  # tiktoken's own panics where encode() does not

    return Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=load_tiktoken_bpe(
            str(ROOT / "assets" / "gpt2.tiktoken"),
            expected_hash="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        ),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def cut(text, start, end):
    """The last place between `start` and `end` where a text can be cut without changing its tokens: before a run of
    white space, which in GPT-2's pattern only begins a match or is all of it. Without any, `end`."""
    for low in (max(start, end - 1000), start):  # looking at the last characters is usually enough
        last = max(text.rfind(space, low, end) for space in WHITE_SPACE)
        place = start + len(text[start : last + 1].rstrip(WHITE_SPACE))
        if place > start:
            return place
    return end


def pieces(text):
    """Cut a long text where that changes no token, so that tiktoken can encode it, with little memory.

    A run of white space is cut before its last character, which belongs to the word that follows: the end of a text is
    found without backtracking.
    """
    start = 0
    runs = [run.end() - 1 for run in LONG_RUN.finditer(text) if run.end() < len(text)]
    for end in (*runs, len(text)):
        while end - start > LONGEST_WORD and not LONG_RUN.fullmatch(text, start, end):
            middle = cut(text, start, start + LONGEST_WORD)
            yield text[start:middle]
            start = middle
        yield text[start:end]
        start = end


def encode(text):
    """The tokens of a text as uint32. A text that spells out <|endoftext|> is ordinary text; a lone surrogate is "?".

    Raises UserError where the tokenizer does.
    """
    tokenizer = get_tokenizer()
    try:
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode("utf-8")
        if len(text) <= LONG:
            return tokenizer.encode_to_numpy(text, disallowed_special=())
        return np.concatenate([tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)])
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in tiktoken's Rust is not an Exception
        raise UserError(f"the tokenizer fails on {len(text):,} characters that begin {text[:40]!r}: {error}") from None
