import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import tokenizer
from lib.tokenizer import WHITE_SPACE, cut, encode, get_tokenizer

ALPHABET = [*"ab19.'sdmtlve 、東é\n\t\u3000\xa0\x1c\x85", "  ", " " * 9, "\n" * 9, "word", "don't", "1,000.5"]
TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=60).map("".join)


def plain(text):
    return get_tokenizer().encode_to_numpy(text, disallowed_special=()).tolist()


@pytest.fixture
def low_limits(monkeypatch):
    """Limits so low that short texts reach them."""
    monkeypatch.setattr(tokenizer, "LONG", 6)
    monkeypatch.setattr(tokenizer, "LONG_RUN", re.compile(f"[{WHITE_SPACE}]{{6,}}"))
    monkeypatch.setattr(tokenizer, "LONGEST_WORD", 40)


@settings(max_examples=2000, deadline=None)
@given(TEXTS)
def test_a_text_can_be_cut_before_white_space_without_a_change_of_its_tokens(text):
    for end in range(1, len(text) + 1):
        place = cut(text, 0, end)
        if place < end:
            assert plain(text[:place]) + plain(text[place:]) == plain(text)


def test_the_limits_change_no_token(low_limits):
    @settings(max_examples=2000, deadline=None)
    @given(TEXTS.filter(lambda text: max(map(len, re.split(f"[{WHITE_SPACE}]", text))) < 30))
    def check(text):
        assert encode(text).tolist() == plain(text)

    check()


@pytest.mark.parametrize("space, word", [(" ", "b"), ("\n", "b"), (" \n\t", ""), ("\u3000", "b")])
def test_a_million_white_space_characters_are_tokens_like_others(space, word):
    run = space * (1_200_000 // len(space))
    kept = len(run) - bool(word)  # the last one belongs to the word
    expected = [*plain("a"), *plain(run[:kept]), *plain(run[kept:] + word)]
    assert encode("a" + run + word).tolist() == expected
    assert get_tokenizer().encode_ordinary("a" + run + word) == expected


def test_a_word_without_an_end_is_tokenized_in_parts(monkeypatch):
    text = "ab" * 300_000
    assert encode(text).tolist() == plain(text)
    monkeypatch.setattr(tokenizer, "LONGEST_WORD", 1 << 17)
    assert np.array_equal(
        encode(text), np.concatenate([plain(text[i : i + (1 << 17)]) for i in range(0, len(text), 1 << 17)])
    )
