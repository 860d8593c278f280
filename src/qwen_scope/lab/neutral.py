"""Beginnings that belong to no language: times, numbers, emoji, names in Latin letters."""

from __future__ import annotations

from .dice import Dice

NAMES = ("Anna", "Omar", "Lena", "Ivan", "Nina", "Paul", "Emma", "Adam", "Mei", "Kim", "Sara", "Leo", "Yuki", "Noor")
EMOJI = ("🙂", "⭐", "🎵", "☀", "❄", "✉", "☎", "⚽")
FORMS = ("log", "number", "list", "hash", "emoji", "pair", "mail", "bullet", "bar", "stars")


def prefix(dice: Dice) -> tuple[str, str]:
    """The name of a form and a prefix in it."""
    form = dice.pick(FORMS)
    name, number = dice.pick(NAMES), dice.between(1, 99)
    clock = f"{dice.below(24):02d}:{dice.below(60):02d}"
    written = {
        "log": f"[{clock}] {name}: ",
        "number": f"No. {number} - ",
        "list": f"{number}. ",
        "hash": f"#{number} ",
        "emoji": f"{dice.pick(EMOJI)} ",
        "pair": f"({number}/{number + dice.between(1, 9)}) ",
        "mail": f"@{name}: ",
        "bullet": "* ",
        "bar": f"{clock} | {name} | ",
        "stars": f"*** {number} *** ",
    }
    return form, written[form]
