"""
The GPT-2 BPE, which every script uses.
"""

import functools

from lib.files import ROOT

EOT = 50256  # <|endoftext|>, the one special token of GPT-2, and the last
VOCAB_SIZE = EOT + 1  # tokens; a model may have more ids, which only pad its matrices


@functools.cache
def get_tokenizer():
    """The GPT-2 BPE as a tiktoken.Encoding, from assets/: tiktoken's own is a download, and clusters are offline."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=load_tiktoken_bpe(
            str(ROOT / "assets" / "gpt2.tiktoken"),
            expected_hash="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        ),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=VOCAB_SIZE,
    )
