"""Arithmetic: worked sums, and whether an answer is right."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen_scope.errors import InputError

from .dice import Dice, share
from .types import Prompt

_HELDOUT = 0.08
_NUMBER = re.compile(r"-?\d+")
FORMATS = ("spaced", "tight", "steps", "colon", "question", "reversed")
HELDOUT_FORMAT = "reversed"


@dataclass(frozen=True)
class Sum:
    """Two operands and what stands between them."""

    a: int
    sign: str
    b: int

    @property
    def value(self) -> int:
        """The result."""
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]

    @property
    def text(self) -> str:
        """The question as it is asked."""
        return f"{self.a} {self.sign} {self.b}"

    def worked(self) -> str:
        """The way to the result, in steps that need no language."""
        a, b = self.a, self.b
        if self.sign == "*":
            return f"{self.text} = {self.value}"
        tens, ones = b - b % 10, b % 10
        if not tens or not ones:
            return f"{self.text} = {self.value}"
        between = a + tens if self.sign == "+" else a - tens
        return f"{self.text} = {a} {self.sign} {tens} {self.sign} {ones} = {between} {self.sign} {ones} = {self.value}"


def heldout(total: Sum) -> bool:
    """Whether training never sees this sum."""
    return share(f"sum|{total.text}") < _HELDOUT


def draw_sum(dice: Dice, split: str) -> Sum:
    """A sum of the split: the hold-outs of sentences and of combinations are both sums never seen."""
    wanted = split in ("heldout_sentences", "heldout_combinations")
    while True:
        sign = dice.pick("++--*")
        if sign == "*":
            total = Sum(dice.between(2, 12), sign, dice.between(2, 12))
        else:
            a, b = dice.between(1, 99), dice.between(1, 99)
            total = Sum(max(a, b), sign, min(a, b)) if sign == "-" else Sum(a, sign, b)
        if heldout(total) is wanted:
            return total


def write_sum(total: Sum, form: str) -> str:
    """One line in the given format."""
    if form == "tight":
        return f"{total.a}{total.sign}{total.b}={total.value}"
    if form == "steps":
        return total.worked()
    if form == "colon":
        return f"{total.text}: {total.value}"
    if form == "question":
        return f"{total.text} = ? {total.value}"
    if form == "reversed":
        return f"{total.value} = {total.text}"
    return f"{total.text} = {total.value}"


def check_arithmetic(prompt: Prompt, completion: str) -> bool:
    """Whether the last number of the completion is the prompt's expected result.

    Only text before the end of the turn counts. Raises `InputError` for a prompt that asks no sum.
    """
    if prompt.expected is None:
        raise InputError("this prompt asks no sum; take prompts from arithmetic_prompts")
    answer = completion.split("<|im_end|>")[0].split("</think>")[-1]
    numbers = _NUMBER.findall(re.sub(r"(?<=\d)-", " - ", answer))
    return bool(numbers) and int(numbers[-1]) == prompt.expected
