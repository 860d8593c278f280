"""Documents some at a time, and the lab's talk in two classes: what streams and `classify transfer` read."""

from __future__ import annotations

from collections import Counter

import pytest

from qwen_scope.errors import InputError, NotFoundError, QwenScopeWarning
from qwen_scope.lab import LANGUAGES
from qwen_scope.text import Corpus, Document, lab_corpus, windows

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_windows_hold_every_document_in_order() -> None:
    rows = [{"text": str(i)} for i in range(7)]
    found = list(windows(Corpus(rows), 3, any_kind=False))
    assert [[one.text for one in some] for some in found] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]


def test_conversations_are_passed_over_and_counted() -> None:
    rows = [{"text": "x"}, {"text": CHAT}, {"text": CHAT}, {"text": "y"}]
    with pytest.warns(QwenScopeWarning, match="2 of 4 rows .* 2 a conversation, not a text"):
        assert [[one.text for one in some] for some in windows(Corpus(rows), 2, any_kind=False)] == [["x"], ["y"]]
    assert [one.plain for some in windows(Corpus(rows), 2, any_kind=True) for one in some] == ["x", "a\nb", "a\nb", "y"]
    with pytest.raises(InputError, match="nothing but conversations"):
        list(windows(Corpus(rows[1:3]), any_kind=False))


def test_the_lab_in_two_classes() -> None:
    corpus = lab_corpus("register", "rude", each=3)
    rows = [document for document in corpus if isinstance(document, Document)]
    counts = Counter((d.meta["language"], d.meta["register"] == "rude") for d in rows)
    assert counts == {(language, rude): 3 for language in LANGUAGES for rude in (True, False)}
    with pytest.raises(NotFoundError, match="no register 'rudee'; did you mean"):
        lab_corpus("register", "rudee")
    with pytest.raises(InputError, match="the lab has registers in languages"):
        lab_corpus("kind", "talk")
