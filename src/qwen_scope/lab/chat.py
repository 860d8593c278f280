"""Chats in Qwen's template: a question, a think block that may be empty, an answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .dice import Dice, digest, share
from .grammar import Template, load
from .page import Page
from .sentences import Sentence, draw, keys
from .sums import Sum, draw_sum
from .types import LANGUAGES

_HELDOUT_QUESTIONS = 0.08

STYLES = ("topic", "sum", "named_language")
TOPICS = ("person", "place", "food", "object", "animal")
_USER, _ASSISTANT, _END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
EMPTY_THINK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Question:
    """What the user asks, and what an answer needs to know."""

    text: str
    language: str
    register: str
    answer_language: str
    topic: tuple[str, str] | None
    total: Sum | None
    think: str

    @property
    def factors(self) -> dict[str, str]:
        """What the question is about."""
        if self.total is not None:
            return {"sum": self.total.text, "result": str(self.total.value)}
        return {"topic": f"{self.topic[0]}:{self.topic[1]}"} if self.topic else {}


@cache
def _question_forms(code: str, register: str, heldout: bool) -> tuple[Template, ...]:
    forms = sorted(load(code).phrases[f"ask.{register}"], key=lambda form: digest(f"template|{form.id}"))
    return tuple(forms[:1] if heldout else forms[1:])


def _choose_topic(code: str, register: str, split: str, dice: Dice) -> tuple[Template, str, str]:
    """A question form and its topic; a hold-out asks in forms, or about topics in a form, that training never does."""
    forms = _question_forms(code, register, split == "heldout_templates")
    wanted = split in ("heldout_sentences", "heldout_combinations")
    while True:
        form, slot = dice.pick(forms), dice.pick(TOPICS)
        key = dice.pick(keys(code, slot))
        held = share(f"question|{form.id}|{slot}|{key}") < _HELDOUT_QUESTIONS
        if split == "heldout_templates" or held is wanted:
            return form, slot, key


def ask(code: str, register: str, split: str, dice: Dice, style: str) -> Question:
    """A question in the style `topic`, `sum` or `named_language` (a topic, with the language of the answer named)."""
    language = load(code)
    if style == "sum":
        total = draw_sum(dice, split)
        fill = {"sum": {"cite": total.text}}
        text = language.finish(dice.pick(language.phrases[f"sum.{register}"]).write(fill))
        think = language.finish(dice.pick(language.phrases[f"think_sum.{register}"]).write(fill))
        return Question(text, code, register, code, None, total, f"{think} {total.worked()}")
    form, slot, key = _choose_topic(code, register, split, dice)
    answer_language = dice.pick(LANGUAGES) if style == "named_language" else code
    fill = {"topic": language.lexicon[slot][key], "language": {"cite": language.names[answer_language]}}
    text = language.finish(form.write(fill))
    if style == "named_language":
        request = dice.pick(language.phrases[f"answer_in.{register}"]).write(fill)
        text += language.space + language.finish(request)
    think = language.finish(dice.pick(language.phrases[f"think.{register}"]).write(fill))
    return Question(text, code, register, answer_language, (slot, key), None, think)


def open_chat(page: Page, question: Question, dice: Dice, empty_think: bool | None = None) -> None:
    """Writes the user's turn and the assistant's turn up to where the answer begins."""
    factors = {"language": question.language, "register": question.register}
    page.add(_USER)
    page.add(question.text, {**factors, "role": "user"})
    page.add(_END + _ASSISTANT)
    if dice.chance(0.5) if empty_think is None else empty_think:
        page.add(EMPTY_THINK)
        return
    page.add("<think>\n")
    page.add(question.think, {**factors, "register": "plain", "role": "think"})
    page.add("\n</think>\n\n")


def close_chat(page: Page) -> None:
    """Ends the assistant's turn."""
    page.add(_END)


def say(page: Page, sentence: Sentence, gap: str, **more: str) -> None:
    """Appends one labelled sentence after a gap."""
    page.add(gap)
    page.add(sentence.text, {**sentence.factors, **more})


def answer(page: Page, question: Question, split: str, dice: Dice, count: int) -> None:
    """Writes the answer: sentences about the topic, or the worked sum and its result."""
    if question.total is not None:
        language = load(question.language)
        fill = {"result": {"cite": str(question.total.value)}}
        page.add(question.total.worked(), {"role": "assistant", "task": "arithmetic"})
        page.add("\n")
        result = dice.pick(language.phrases[f"result.{question.register}"]).write(fill)
        factors = {"language": question.language, "register": question.register, "role": "assistant"}
        page.add(language.finish(result), factors)
        return
    talk(page, question.answer_language, question.register, split, dice, count, question.topic, role="assistant")


def talk(
    page: Page,
    code: str,
    register: str,
    split: str,
    dice: Dice,
    count: int,
    topic: tuple[str, str] | None = None,
    **more: str,
) -> None:
    """Writes `count` sentences of one language and register, about the topic where there is one."""
    space = load(code).space
    for i in range(count):
        sentence = draw(code, register, split, dice, topic if topic and dice.chance(0.8) else None)
        say(page, sentence, space if i else "", **more)
