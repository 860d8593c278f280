"""The lab as a source: all of it, or the documents with some factors."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.lab import LANGUAGES, REGISTERS, documents
from qwen_scope.text import Corpus, CorpusOptions, conditions, is_lab


@pytest.mark.parametrize(
    ("source", "chosen"),
    [
        ("lab", {}),
        ("lab:language=de", {"languages": ["de"], "kinds": ["talk"]}),
        ("lab:language=de,register=rude", {"languages": ["de"], "registers": ["rude"], "kinds": ["talk"]}),
        ("lab:register!=rude", {"registers": [one for one in REGISTERS if one != "rude"], "kinds": ["talk"]}),
        ("lab:language!=de,language!=fr", {"languages": sorted({*LANGUAGES} - {"de", "fr"}), "kinds": ["talk"]}),
        ("lab:kind=chat", {"kinds": ["chat"]}),
        ("lab: kind = code ", {"kinds": ["code"]}),
    ],
)
def test_documents_are_those_of_the_lab(source: str, chosen: dict[str, list[str]]) -> None:
    corpus = Corpus(source, sample=12, seed=3)
    if "languages" in chosen:
        chosen["languages"] = [one for one in LANGUAGES if one in chosen["languages"]]
    expected = list(documents(seed=3, n=12, **chosen))
    found = list(corpus)
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.meta["id"] for one in found] == [one.id for one in expected]
    assert not corpus.endless
    assert Corpus(source).endless


def test_it_goes_on_from_a_cursor_and_shares() -> None:
    source = "lab:language=ja"
    whole = [one.text for one in Corpus(source, sample=10)]
    corpus = Corpus(source, sample=10)
    stream = iter(corpus)
    first = [next(stream).text for _ in range(4)]
    again = Corpus(source, sample=10)
    again.seek(corpus.cursor())
    assert first + [one.text for one in again] == whole
    parts = [[one.text for one in Corpus(source, sample=10, rank=rank, world=3)] for rank in range(3)]
    assert [text for i in range(4) for part in parts for text in part[i : i + 1]] == whole


def test_another_path_is_the_same_name(tmp_path: Path) -> None:
    assert is_lab(Path("lab:language=de"))
    assert is_lab("lab")
    assert not any(is_lab(one) for one in ("labor", "my/lab", tmp_path / "lab", ["lab"], 3, None))
    assert Corpus(Path("lab:language=de"), sample=2).name == "lab:language=de:train:0:2"
    assert Corpus("lab", sample=2).name == "lab:train:0:2"


@pytest.mark.parametrize("text", ["language", "=de", "language=de,,", "!=de", ",", "  =x", ""])
def test_what_states_no_condition(text: str) -> None:
    with pytest.raises(InputError, match="no condition on metadata"):
        Corpus(f"lab:{text}", sample=1)
    with pytest.raises(InputError, match="no condition on metadata"):
        conditions(text)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("lab:colour=red", "the lab's factors are kind, language, register, not 'colour'"),
        ("lab:language=xx", "a language of the lab is one of"),
        ("lab:register=de", "a register of the lab is one of"),
    ],
)
def test_factors_that_the_lab_does_not_have(source: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Corpus(source)
    with pytest.raises(NotFoundError, match="split"):
        Corpus("lab:language=de", split="nowhere")


def test_a_corpus_of_options_is_that_of_the_arguments(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\nfour\n")
    for options in (CorpusOptions(), CorpusOptions(unit="line"), CorpusOptions(unit="line", sample=2, seed=1)):
        corpus = Corpus.of(path, options, rank=0, world=2)
        same = Corpus(path, unit=options.unit, sample=options.sample, seed=options.seed, rank=0, world=2)
        assert [one.text for one in corpus] == [one.text for one in same]
        assert corpus.description == same.description
