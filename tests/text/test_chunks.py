"""A text read a chunk at a time gives the tokens of the whole."""

from __future__ import annotations

import random

import pytest
import tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen_scope import load_scope
from qwen_scope.errors import InputError
from qwen_scope.lab import documents
from qwen_scope.text import chunks, tokenize

WORDS = [
    "the",
    "Bahnhof",
    "don't",
    "1234",
    "é",
    "e\u0301",
    "안녕하세요",
    "你好，世界。",
    "مرحبا",
    "🙂",
    "👩‍👩‍👧",
    "...",
    "\u202e",
]
GAPS = [" ", "  ", "\n", "\r\n\n ", "\t", "", " " * 40, "<|im_start|>"]


@pytest.fixture(scope="module", params=["lab", "tiny"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "lab":
        return load_scope("lab", device="cpu").tokenizer
    return AutoTokenizer.from_pretrained(tiny.folder() / "model")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches so short that a page has many seams."""
    import importlib

    place = importlib.import_module("qwen_scope.text.chunks")
    monkeypatch.setattr(place, "CHUNK", 400)
    monkeypatch.setattr(place, "MARGIN", 60)


def together(tokenizer: PreTrainedTokenizerBase, text: str, **options: str) -> tuple[list[int], list[str], int]:
    parts = list(chunks(tokenizer, text, **options))
    return [i for part in parts for i in part.ids], [s for part in parts for s in part.strings], len(parts)


@pytest.mark.parametrize("seed", range(6))
def test_seams_leave_no_trace(tokenizer: PreTrainedTokenizerBase, short: None, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(900))
    whole = tokenize(tokenizer, [text], max_length=None)
    ids, strings, parts = together(tokenizer, text)
    assert ids == whole.input_ids[0].tolist()
    assert strings == whole.strings[0]
    assert parts > 10


def test_pages_of_the_lab_and_a_chat_are_the_same(tokenizer: PreTrainedTokenizerBase, short: None) -> None:
    text = "\n".join(document.text for document in documents(seed=4, n=12))
    for options in ({}, {"chat": "default"}) if tokenizer.chat_template else ({},):
        whole = tokenize(tokenizer, [text], max_length=None, **options)
        ids, strings, _ = together(tokenizer, text, **options)
        assert ids == whole.input_ids[0].tolist()
        assert strings == whole.strings[0]


def test_one_endless_word_is_cut_and_nothing_of_it_is_lost(tokenizer: PreTrainedTokenizerBase, short: None) -> None:
    text = "hello " + "ab" * 3000 + " hello"
    ids, strings, parts = together(tokenizer, text)
    assert "".join(strings) == text
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert parts > 10


def test_what_has_no_token_or_no_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    for text, options, said in (
        ("", {}, "is empty"),
        ("\ud800", {}, "surrogate"),
        ("x", {"chat": "loud"}, "chat is one of"),
    ):
        with pytest.raises(InputError, match=said):
            together(tokenizer, text, **options)
    assert together(tokenizer, "x")[2] == 1
