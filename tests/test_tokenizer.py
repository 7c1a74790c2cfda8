import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import tokenizer
from lib.tokenizer import encode, get_tokenizer, pieces

ALPHABET = [*"ab19.'sdmtlve 、東é\n\t\u3000\xa0\x85", "  ", " " * 9, "\n" * 9, "word", "don't", "1,000.5"]
TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=60).map("".join)


def plain(text):
    return get_tokenizer().encode_to_numpy(text, disallowed_special=()).tolist()


def test_pieces_change_no_token(monkeypatch):
    monkeypatch.setattr(tokenizer, "LONGEST", 40)

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text):
        assert "".join(pieces(text)) == text
        if not re.search(r"\s{30}|\S{30}", text):
            assert encode(text).tolist() == plain(text)

    check()


@pytest.mark.parametrize("space", [" ", "\n", " \n\t", "\u3000"])
def test_a_million_white_space_characters_are_tokens_like_others(space):
    text = "a" + space * (1_200_000 // len(space)) + "b"
    assert get_tokenizer().decode(encode(text).tolist()) == text
    assert get_tokenizer().encode_ordinary(text) == encode(text).tolist()


def test_a_word_without_an_end_is_tokenized_in_parts(monkeypatch):
    text = "ab" * 300_000
    assert encode(text).tolist() == plain(text)
    monkeypatch.setattr(tokenizer, "LONGEST", 1 << 17)
    parts = [plain(text[i : i + (1 << 17)]) for i in range(0, len(text), 1 << 17)]
    assert np.array_equal(encode(text), np.concatenate(parts))


def test_no_folder_for_a_cache_is_needed(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/proc/nowhere")
    assert get_tokenizer.__wrapped__().n_vocab == 50257
