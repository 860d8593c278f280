"""Sentences under a split: which fillings training may see, and which it never does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from qwen_scope.errors import InputError

from .dice import Dice, digest, share
from .grammar import SLOT_LEXICON, Entry, Language, Template, load

# Per language and register, of the framed statements and of the sentences that address somebody, each.
HELDOUT_TEMPLATES = 3
HELDOUT_COMBINATIONS = 0.06
HELDOUT_SENTENCES = 0.05
_TRIES = 4000
_TRIES_GIVEN = 200


@dataclass(frozen=True)
class Sentence:
    """A written sentence and its factors."""

    text: str
    factors: Mapping[str, str]


@cache
def heldout_templates(code: str, register: str) -> frozenset[str]:
    """The ids of the templates of this language and register that training never sees."""
    held: list[str] = []
    for framed in (True, False):
        ids = [template.id for template in load(code).templates[register] if template.framed is framed]
        held += sorted(ids, key=lambda name: digest(f"template|{name}"))[:HELDOUT_TEMPLATES]
    return frozenset(held)


@cache
def _pool(code: str, register: str, split: str, slot: str) -> tuple[Template, ...]:
    held = heldout_templates(code, register)
    wanted = split == "heldout_templates"
    found = [t for t in load(code).templates[register] if (t.id in held) is wanted]
    return tuple([t for t in found if slot in t.slots] or found) if slot else tuple(found)


@cache
def keys(code: str, slot: str) -> tuple[str, ...]:
    """The keys that may fill a slot; they are the same in every language."""
    return tuple(load(code).lexicon[SLOT_LEXICON.get(slot, slot)])


def heldout_combination(template_id: str, slots: Mapping[str, str]) -> bool:
    """Whether some word stands in this template although training never shows it there."""
    return any(share(f"word|{template_id}|{slot}|{key}") < HELDOUT_COMBINATIONS for slot, key in slots.items())


def heldout_sentence(template_id: str, slots: Mapping[str, str]) -> bool:
    """Whether this full filling is kept out of training."""
    filling = ",".join(f"{slot}={key}" for slot, key in sorted(slots.items()))
    return share(f"filling|{template_id}|{filling}") < HELDOUT_SENTENCES


def split_of(template: Template, slots: Mapping[str, str]) -> str:
    """The one split that this filling belongs to."""
    if template.id in heldout_templates(template.language, template.register):
        return "heldout_templates"
    if heldout_combination(template.id, slots):
        return "heldout_combinations"
    return "heldout_sentences" if heldout_sentence(template.id, slots) else "train"


def entries_for(language: Language, slots: Mapping[str, str]) -> dict[str, Entry]:
    """The lexicon entries behind the chosen keys."""
    return {slot: language.lexicon[SLOT_LEXICON.get(slot, slot)][key] for slot, key in slots.items()}


def write(language: Language, template: Template, slots: Mapping[str, str], dice: Dice) -> str:
    """The finished sentence, in a frame that the dice choose when the template takes one."""
    text = template.write(entries_for(language, slots))
    if template.framed:
        openers, closers = language.openers[template.register], language.closers[template.register]
        # Plain speech may go unmarked; the other registers carry an opener, a closer or both.
        style = dice.below(3) if template.register != "plain" else 2
        opener = dice.pick(openers) if style != 1 else ""
        closer = dice.pick(closers) if style != 0 else _full_stop(language)
        text = opener + text + closer
    return language.finish(text)


def _full_stop(language: Language) -> str:
    return "。" if language.code in ("zh", "ja") else "."


def draw(code: str, register: str, split: str, dice: Dice, given: tuple[str, str] | None = None) -> Sentence:
    """A sentence of this language, register and split, about the given (slot, key) where the split has one."""
    language = load(code)
    pool = _pool(code, register, split, given[0] if given else "")
    for attempt in range(_TRIES):
        if given and attempt == _TRIES_GIVEN:
            given, pool = None, _pool(code, register, split, "")
        template = dice.pick(pool)
        slots = {slot: dice.pick(keys(code, slot)) for slot in template.slots}
        if given and given[0] in slots:
            slots[given[0]] = given[1]
        if "other" in slots and slots["other"] == slots.get("person"):
            continue
        if split_of(template, slots) == split:
            return Sentence(write(language, template, slots, dice), factors_of(template, slots))
    raise InputError(f"no sentence of split {split!r} was found in {code} {register} after {_TRIES} tries")


def factors_of(template: Template, slots: Mapping[str, str]) -> dict[str, str]:
    """What a span says about a sentence."""
    factors = {
        "language": template.language,
        "register": template.register,
        "meaning": template.meaning,
        "template": template.id,
    }
    factors.update((f"slot.{slot}", key) for slot, key in slots.items())
    return factors
