"""Documents that repeat themselves: on purpose (an echo, a list, a refrain) or without end (a loop)."""

from __future__ import annotations

from . import chat
from .dice import Dice
from .grammar import load
from .page import Page
from .sentences import draw

FORMS = ("echo", "options", "refrain", "loop_talk", "loop_chat")
LOOPS = ("loop_talk", "loop_chat")


def write(page: Page, code: str, register: str, split: str, dice: Dice, form: str) -> dict[str, str]:
    """Writes one repetitive document; the factors say whether it is benign or an endless loop."""
    if form == "echo":
        _echo(page, code, register, split, dice)
    elif form == "options":
        _options(page, code, register, split, dice)
    elif form == "refrain":
        _refrain(page, code, register, split, dice)
    else:
        _loop(page, code, register, split, dice, form == "loop_chat")
    return {"form": form, "repetition": "loop" if form in LOOPS else "benign"}


def _echo(page: Page, code: str, register: str, split: str, dice: Dice) -> None:
    language = load(code)
    question = chat.ask(code, register, split, dice, "topic")
    chat.open_chat(page, question, dice)
    echo = dice.pick(language.phrases[f"echo.{register}"]).write({"question": {"cite": question.text}})
    page.add(echo, {"language": code, "register": register, "role": "echo"})
    page.add("\n")
    chat.answer(page, question, split, dice, dice.between(2, 4))
    chat.close_chat(page)


def _options(page: Page, code: str, register: str, split: str, dice: Dice) -> None:
    language = load(code)
    slot = dice.pick(("food", "object", "animal"))
    items = [
        language.lexicon[slot][dice.pick(tuple(language.lexicon[slot]))]["cite"] for _ in range(dice.between(3, 5))
    ]
    heading = dice.pick(language.phrases[f"options.{register}"]).write({})
    labels = {"language": code, "register": register}
    for role in ("list", "list again"):
        page.add(heading, {**labels, "role": role})
        page.add("\n" + "".join(f"- {item}\n" for item in items))
    chat.talk(page, code, register, split, dice, dice.between(1, 3))


def _refrain(page: Page, code: str, register: str, split: str, dice: Dice) -> None:
    refrain = draw(code, register, split, dice)
    for verse in range(dice.between(3, 4)):
        for _ in range(dice.between(1, 2)):
            chat.say(page, draw(code, register, split, dice), "", role="verse")
            page.add("\n")
        chat.say(page, refrain, "", role="refrain", verse=str(verse))
        page.add("\n\n")


def _loop(page: Page, code: str, register: str, split: str, dice: Dice, in_chat: bool) -> None:
    space = load(code).space
    topic = None
    if in_chat:
        question = chat.ask(code, register, split, dice, "topic")
        topic = question.topic
        chat.open_chat(page, question, dice)
    before = dice.between(1, 2)
    chat.talk(page, code, register, split, dice, before, topic, role="before")
    phrase = draw(code, register, split, dice, topic)
    for turn in range(dice.between(6, 16)):
        chat.say(page, phrase, space, role="loop", turn=str(turn))
