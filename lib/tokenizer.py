"""The GPT-2 BPE, which every script uses."""

import base64
import functools
import hashlib

import numpy as np

from lib.console import UserError
from lib.files import ROOT

EOT = 50256  # <|endoftext|>, GPT-2's only special token, with the highest id
VOCAB_SIZE = EOT + 1  # tokens; a model may have more ids, which only pad its matrices
RANKS = ROOT / "assets" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
LONGEST = 900_000  # characters that are encoded at once; tiktoken fails on 1,000,000 spaces in a row


@functools.cache
def get_tokenizer():
    """The GPT-2 BPE as a tiktoken.Encoding, from assets/: tiktoken itself downloads it, and clusters are offline."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    class Encoding(tiktoken.Encoding):
        def encode_ordinary(self, text):
            return encode(text).tolist()  # tiktoken's own fails where encode() does not

    content = RANKS.read_bytes()  # tiktoken's own reader needs a folder for its cache
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise UserError(f"{RANKS} is damaged: restore it, for example with git checkout")
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    return Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": EOT})


def pieces(text):
    """Cut a text into pieces that tiktoken can encode: before white space, which changes no token. Only within LONGEST
    characters of white space or of one word it does."""
    start = 0
    while len(text) - start > LONGEST:
        window = text[start : start + LONGEST]
        words = window.rsplit(None, 1)
        piece = words[0] if len(words) == 2 else window.rstrip() or window
        yield piece
        start += len(piece)
    yield text[start:]


def encode(text):
    """The tokens of a text as uint32. <|endoftext|> in it is ordinary text, a lone surrogate is "?". Raises UserError
    if tiktoken fails."""
    tokenizer = get_tokenizer()
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
    try:
        parts = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)]
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in tiktoken's Rust is not an Exception
        raise UserError(f"the tokenizer fails on {len(text):,} characters that begin {text[:40]!r}: {error}") from None
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
