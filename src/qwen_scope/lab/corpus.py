"""The corpus: a stream of labelled documents, and groups of parallel sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from qwen_scope.errors import InputError, check_count

from . import chat, neutral, real, repetition, sums
from .dice import Dice, digest
from .grammar import load
from .mixture import Mixture, default_mixture
from .page import Page
from .sentences import keys, split_of, write
from .types import KINDS, LANGUAGES, REGISTERS, SPLITS, Document, ParallelGroup, check_names

WORDLESS = ("arithmetic", "code", "prose")


def documents(
    split: str = "train",
    seed: int = 0,
    n: int | None = 1000,
    kinds: Iterable[str] | None = None,
    languages: Iterable[str] | None = None,
    registers: Iterable[str] | None = None,
    mixture: Mixture | None = None,
) -> Iterator[Document]:
    """A stream of `n` documents (without end for None); the i-th depends on the arguments and i, never on `n`.

    Naming languages or registers without naming kinds leaves out the kinds that have none (arithmetic, code, prose).
    Raises `NotFoundError` for a split, kind, language or register that does not exist.
    """
    if n is not None:
        check_count("n", n, 0)
    check_names("split", (split,), SPLITS)
    chosen = check_names("kind", kinds, KINDS)
    if kinds is None and (languages is not None or registers is not None):
        chosen = tuple(kind for kind in KINDS if kind not in WORDLESS)
    mixture = mixture or default_mixture()
    _check(mixture)
    spoken = check_names("language", languages, LANGUAGES)
    toned = check_names("register", registers, REGISTERS)
    kind_weights = _among(mixture.kinds, chosen, "kind")
    language_weights = _among(mixture.languages, spoken, "language")
    register_weights = _among(mixture.registers, toned, "register")
    if "drift" in kind_weights and not any(mixture.drift.get(code) for code in language_weights):
        raise InputError(f"the mixture lets none of these languages drift: {', '.join(language_weights)}")
    return _stream(split, seed, n, kind_weights, language_weights, register_weights, mixture)


def _check(mixture: Mixture) -> None:
    for what, table, known in (
        ("kind", mixture.kinds, KINDS),
        ("language", mixture.languages, LANGUAGES),
        ("register", mixture.registers, REGISTERS),
        ("language", mixture.drift, LANGUAGES),
        ("language", {into for row in mixture.drift.values() for into in row}, LANGUAGES),
        ("chat style", mixture.chat, chat.STYLES),
        ("form of repetition", mixture.repetition, repetition.FORMS),
    ):
        if table:
            check_names(what, table, known)
    shortest, longest = mixture.sentences
    if not 1 <= shortest <= longest:
        raise InputError(f"a talk can't have {shortest} to {longest} sentences; name at least 1, the smaller first")


def _among(weights: Mapping[str, float], names: tuple[str, ...], what: str) -> dict[str, float]:
    found = {name: weights[name] for name in names if weights.get(name, 0) > 0}
    if not found:
        raise InputError(f"the mixture gives no weight to any chosen {what}: {', '.join(names)}")
    return found


def _stream(
    split: str,
    seed: int,
    n: int | None,
    kinds: Mapping[str, float],
    languages: Mapping[str, float],
    registers: Mapping[str, float],
    mixture: Mixture,
) -> Iterator[Document]:
    sources = {code: sum(mixture.drift.get(code, {}).values()) for code in languages}
    i = 0
    while n is None or i < n:
        dice = Dice(f"document|{split}|{seed}|{i}")
        kind = dice.weighted(kinds)
        code = dice.weighted(sources if kind == "drift" else languages)
        yield make(kind, code, dice.weighted(registers), split, dice, mixture, f"{split}|{seed}|{i}")
        i += 1


def make(kind: str, code: str, register: str, split: str, dice: Dice, mixture: Mixture, key: str) -> Document:
    """One document of this kind; `key` makes its id."""
    page = Page()
    factors: dict[str, str] = {}
    language: str | None = code
    tone: str | None = register
    if kind in WORDLESS:
        language, tone = None, None
        factors = _wordless(page, kind, split, dice)
    elif kind == "talk":
        chat.talk(page, code, register, split, dice, dice.between(*mixture.sentences))
    elif kind == "neutral":
        form, text = neutral.prefix(dice)
        page.add(text, {"role": "prefix", "form": form})
        chat.talk(page, code, register, split, dice, dice.between(1, 5))
        factors = {"form": form}
    elif kind == "chat":
        style = dice.weighted(mixture.chat)
        question = chat.ask(code, register, split, dice, style)
        chat.open_chat(page, question, dice)
        chat.answer(page, question, split, dice, dice.between(2, 5))
        chat.close_chat(page)
        factors = {"style": style, "answer_language": question.answer_language, **question.factors}
    elif kind == "drift":
        factors = _drift(page, code, register, split, dice, mixture)
    else:
        factors = repetition.write(page, code, register, split, dice, dice.weighted(mixture.repetition))
    name = f"{kind}-{digest(f'{key}|{kind}|{page.text}'):016x}"
    return Document(name, page.text, kind, language, tone, split, factors, tuple(page.spans))


def _wordless(page: Page, kind: str, split: str, dice: Dice) -> dict[str, str]:
    if kind != "arithmetic":
        index, text = real.draw_block(kind, split, dice)
        page.add(text, {"block": str(index)})
        return {"block": str(index)}
    formats = [form for form in sums.FORMATS if (form == sums.HELDOUT_FORMAT) is (split == "heldout_templates")]
    form = dice.pick(formats)
    for i in range(dice.between(4, 12)):
        total = sums.draw_sum(dice, split)
        page.add("\n" if i else "")
        page.add(sums.write_sum(total, form), {"task": "arithmetic", "format": form, "result": str(total.value)})
    return {"format": form}


def _drift(page: Page, code: str, register: str, split: str, dice: Dice, mixture: Mixture) -> dict[str, str]:
    into = dice.weighted(mixture.drift[code])
    topic = None
    form = "chat" if dice.chance(0.75) else "talk"
    if form == "chat":
        question = chat.ask(code, register, split, dice, "topic")
        topic = question.topic
        chat.open_chat(page, question, dice)
    chat.talk(page, code, register, split, dice, dice.between(1, 2), topic, role="before")
    page.add(" ")
    chat.talk(page, into, register, split, dice, dice.between(2, 4), topic, role="drift")
    if form == "chat":
        chat.close_chat(page)
    return {"form": form, "drift_into": into}


def parallel(seed: int = 0, n: int = 100) -> Iterator[ParallelGroup]:
    """`n` groups of one filled meaning in one register, said in all nine languages.

    Hold-outs are decided language by language, so each group says of which split its sentences are.
    """
    check_count("n", n, 0)
    return _parallel(seed, n)


def _parallel(seed: int, n: int) -> Iterator[ParallelGroup]:
    spoken = {code: load(code) for code in LANGUAGES}
    by_meaning = {
        code: {(t.register, t.meaning): t for tone in REGISTERS for t in language.templates[tone]}
        for code, language in spoken.items()
    }
    i = made = 0
    while made < n:
        dice = Dice(f"parallel|{seed}|{i}")
        i += 1
        register = dice.pick(REGISTERS)
        meaning = dice.pick(spoken["en"].templates[register]).meaning
        found = {code: by_meaning[code][register, meaning] for code in LANGUAGES}
        needed = sorted({slot for template in found.values() for slot in template.slots})
        slots = {slot: dice.pick(keys("en", slot)) for slot in needed}
        if slots.get("other") is not None and slots["other"] == slots.get("person"):
            continue
        sentences = {code: write(spoken[code], found[code], slots, dice) for code in LANGUAGES}
        splits = {code: split_of(t, {slot: slots[slot] for slot in t.slots}) for code, t in found.items()}
        yield ParallelGroup(f"parallel-{seed}-{made}", meaning, register, slots, sentences, splits)
        made += 1
