"""What is held out stays out of training, whatever the seed."""

from __future__ import annotations

import pytest

from qwen_scope import lab
from qwen_scope.lab import Document
from qwen_scope.lab.sentences import heldout_combination, heldout_sentence, heldout_templates


def fillings(document: Document) -> list[tuple[str, dict[str, str]]]:
    return [
        (span.factors["template"], {k[5:]: v for k, v in span.factors.items() if k.startswith("slot.")})
        for span in document.spans
        if "template" in span.factors
    ]


def parts(document: Document, role: str) -> list[str]:
    return [document.text[s.start : s.end] for s in document.spans if s.factors.get("role") == role]


@pytest.fixture(scope="module")
def train() -> list[Document]:
    return [document for seed in range(2) for document in lab.documents("train", seed=seed, n=1000)]


@pytest.fixture(scope="module")
def heldout() -> dict[str, list[Document]]:
    return {split: list(lab.documents(split, seed=5, n=150)) for split in lab.SPLITS if split != "train"}


def test_training_never_shows_what_is_held_out(train: list[Document]):
    for document in train:
        for template, slots in fillings(document):
            code, register, _ = template.split(".")
            assert template not in heldout_templates(code, register)
            assert not heldout_combination(template, slots)
            assert not heldout_sentence(template, slots)


def test_each_hold_out_shows_nothing_else(heldout: dict[str, list[Document]]):
    for split, documents in heldout.items():
        for document in documents:
            assert document.split == split
            for template, slots in fillings(document):
                code, register, _ = template.split(".")
                of_template = template in heldout_templates(code, register)
                assert of_template is (split == "heldout_templates")
                if not of_template:
                    assert heldout_combination(template, slots) is (split == "heldout_combinations")


def test_held_out_words_templates_and_pairs_do_not_meet_in_training(
    train: list[Document], heldout: dict[str, list[Document]]
):
    said = {filling_key(f) for document in train for f in fillings(document)}
    pairs = {(t, slot, key) for document in train for t, slots in fillings(document) for slot, key in slots.items()}
    templates = {t for t, _, _ in pairs}
    for split, documents in heldout.items():
        for filling in (f for document in documents for f in fillings(document)):
            template, slots = filling
            assert filling_key(filling) not in said
            assert template not in templates or split != "heldout_templates"
            if split == "heldout_combinations":
                assert not all((template, slot, key) in pairs for slot, key in slots.items())


def filling_key(filling: tuple[str, dict[str, str]]) -> tuple:
    return filling[0], tuple(sorted(filling[1].items()))


def test_every_language_and_register_holds_templates_out():
    for code in lab.LANGUAGES:
        for register in lab.REGISTERS:
            held = heldout_templates(code, register)
            assert len(held) == 6


def test_questions_sums_and_blocks_are_held_out_too(train: list[Document], heldout: dict[str, list[Document]]):
    asked = {text for document in train for text in parts(document, "user")}
    blocks = {(d.kind, d.factors["block"]) for d in train if "block" in d.factors}
    results = {document.factors["sum"] for document in train if "sum" in document.factors}
    for split, documents in heldout.items():
        for document in documents:
            if document.factors.get("style") != "sum":
                assert not asked & set(parts(document, "user"))
            elif split != "heldout_templates":
                assert document.factors["sum"] not in results
            if "block" in document.factors:
                assert (document.kind, document.factors["block"]) not in blocks
    formats = {document.factors["format"] for document in train if document.kind == "arithmetic"}
    new = {d.factors["format"] for d in heldout["heldout_templates"] if d.kind == "arithmetic"}
    assert new
    assert not new & formats


@pytest.mark.parametrize("split", lab.SPLITS)
def test_every_split_has_every_kind_language_and_register(split: str):
    for kind in lab.KINDS:
        assert len(list(lab.documents(split, n=5, kinds=[kind]))) == 5
    for code in lab.LANGUAGES:
        for register in lab.REGISTERS:
            found = list(lab.documents(split, n=3, languages=[code], registers=[register]))
            assert len({document.text for document in found}) == 3
