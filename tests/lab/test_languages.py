"""Every language says everything: the same slots, meanings, registers and phrases, and all fillings can be written."""

from __future__ import annotations

import re
import tomllib
from importlib import resources

import pytest

from qwen_scope.errors import NotFoundError
from qwen_scope.lab import LANGUAGES, REGISTERS
from qwen_scope.lab.dice import Dice
from qwen_scope.lab.grammar import load
from qwen_scope.lab.sentences import keys, write

PHRASES = {"echo", "options", "think", "think_sum", "ask", "answer_in", "sum", "result"}


def raw(code: str) -> dict:
    return tomllib.loads((resources.files("qwen_scope.lab") / "languages" / f"{code}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_language_covers_what_english_covers(code: str):
    own, english = raw(code), raw("en")
    assert {slot: set(entries) for slot, entries in own["lexicon"].items()} == {
        slot: set(entries) for slot, entries in english["lexicon"].items()
    }
    assert set(own["core"]) == set(english["core"])
    assert set(own["address"]) == set(english["address"])
    assert all(set(lines) == set(REGISTERS) for lines in own["address"].values())
    assert all({"plain", "archaic"} <= set(lines) <= set(REGISTERS) for lines in own["core"].values())
    assert set(own["frames"]) == set(REGISTERS)
    assert set(own["chat"]) == PHRASES
    assert set(own["names"]) == set(LANGUAGES)
    for register in REGISTERS:
        assert len(own["frames"][register]["openers"]) >= 8 - (register == "plain")
        assert len(set(own["frames"][register]["closers"])) >= 4
        assert len(own["chat"]["ask"][register]) == 4


@pytest.mark.parametrize("code", LANGUAGES)
def test_there_is_enough_to_say(code: str):
    language = load(code)
    for register in REGISTERS:
        assert len(language.templates[register]) >= 40
        assert len({template.meaning for template in language.templates[register]}) >= 40
    assert all(10 <= len(entries) <= 40 for entries in language.lexicon.values())


@pytest.mark.parametrize("code", LANGUAGES)
def test_meanings_take_the_same_slots_in_every_language(code: str):
    for register in REGISTERS:
        english = {t.meaning: set(t.slots) for t in load("en").templates[register]}
        assert {t.meaning: set(t.slots) for t in load(code).templates[register]} == english


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_word_can_stand_in_every_template(code: str):
    language = load(code)
    dice = Dice(code)
    for templates in language.templates.values():
        for template in templates:
            for i in range(max([len(keys(code, slot)) for slot in template.slots], default=1)):
                slots = {
                    slot: keys(code, slot)[(i + j) % len(keys(code, slot))] for j, slot in enumerate(template.slots)
                }
                text = write(language, template, slots, dice)
                assert not re.search(r"[{}|@/]|  |,,|，，|、、|\.\.", text), text
                assert text[-1] in ".!?。！？؟…", text


@pytest.mark.parametrize("code", LANGUAGES)
def test_words_of_a_slot_differ(code: str):
    for slot, entries in load(code).lexicon.items():
        assert len({entry["cite"] for entry in entries.values()}) == len(entries), slot


def test_particles_follow_the_sound_before_them():
    finish = load("ko").finish
    assert finish("빵을/를 산다") == "빵을 산다"
    assert finish("우유을/를 산다") == "우유를 산다"
    assert finish("마을으로/로 가") == "마을로 가"
    assert finish("시장으로/로 가") == "시장으로 가"
    assert finish("19이야/야") == "19야"
    assert finish("18이야/야") == "18이야"


def test_capitals_follow_the_language():
    assert load("en").finish("shut up! the dog sleeps.") == "Shut up! The dog sleeps."
    assert load("en").finish("'tis so.") == "'Tis so."
    assert load("es").finish("¿eres tonto? anda.") == "¿Eres tonto? Anda."
    assert load("de").finish("kapier das: der Hund schläft.") == "Kapier das: Der Hund schläft."


def test_an_unknown_language_is_refused():
    with pytest.raises(NotFoundError, match="there is no language 'eng'"):
        load("eng")
