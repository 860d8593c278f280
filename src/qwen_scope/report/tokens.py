"""Tokens shaded by a number, inert whatever they contain."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from rich.text import Text

from qwen_scope.errors import printable

# Light to dark orange, readable with black or white on top; lightness carries it, so colour-blind eyes see it too.
SHADES = ("#fff1e0", "#ffd9ad", "#ffb870", "#f08a2c", "#b85a00")

MARK = "⟨⟩"
"""What stands around a token that does not count."""

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""How the names of letters begin whose scripts put no spaces between words."""

LONGEST = 200

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
JOINERS = "\u200c\u200d"


def inert(text: str | Text, keep: str = "") -> Text:
    """Text for the terminal, unchanged but for escaped control codes; of styled text the styles stay where they are.

    Args:
        keep: characters that are let through, such as a newline.
    """
    if isinstance(text, str):
        return Text(printable(text, keep))
    if printable(text.plain, keep) == text.plain:
        return text
    out = Text(style=text.style, justify=text.justify, overflow=text.overflow, no_wrap=text.no_wrap, end=text.end)
    starts = [0]
    for char in text.plain:
        starts.append(starts[-1] + len(printable(char, keep)))
    out.append(printable(text.plain, keep))
    for span in text.spans:
        out.stylize(span.style, starts[span.start], starts[span.end])
    return out


def visible(token: str) -> str:
    """A token as a reader should see it: new lines and tabs as signs; control and direction characters escaped.

    Of a token longer than any real one only the beginning is shown. A joiner between two letters beyond ASCII does its
    work in emoji and in the scripts of Persian or Hindi; anywhere else it is escaped like the others.
    """
    out = []
    for i, char in enumerate(token[:LONGEST]):
        if char == "\n":
            out.append("⏎")
        elif char == "\t":
            out.append("⇥")
        elif char == " " or unicodedata.category(char) not in HIDDEN or _joins(token, i):
            out.append(char)
        else:
            out.append(f"\\u{ord(char):04x}")
    if len(token) > LONGEST:
        out.append(f"… ({len(token) - LONGEST:,} more)")
    return "".join(out)


def _joins(token: str, i: int) -> bool:
    near = token[i - 1 : i], token[i + 1 : i + 2]
    return token[i] in JOINERS and all(c > "\x7f" and unicodedata.category(c) not in HIDDEN for c in near)


def word_start(tokens: Sequence[str], at: int, *, at_start: bool = False) -> int:
    """The first token, up to the one at `at`, with which a word begins, so that no passage begins inside of one.

    A token begins a word if it is the first of the text (`at_start`), begins with white space or follows some, or is of
    a script without spaces.
    """
    for i in range(at):
        first, before = tokens[i][:1], tokens[i - 1][-1:] if i else ""
        if (i == 0 and at_start) or first.isspace() or before.isspace():
            return i
        if first and unicodedata.name(first, "").startswith(UNSPACED):
            return i
    return at


def level(value: float, top: float) -> int | None:
    """Which of the shades a value gets beside the largest value, or None for none."""
    if not (value > 0 and top > 0):
        return None
    return min(len(SHADES) - 1, int(value / top * len(SHADES)))


def shaded(
    tokens: Sequence[str],
    values: Sequence[float],
    maximum: float | None = None,
    *,
    brackets: bool = False,
    left_out: Sequence[str] = (),
) -> Text:
    """The tokens in a row, each on a background as strong as its value; 0 has none.

    Args:
        maximum: the value that gets the strongest shade; by default the largest here.
        brackets: put tokens with more than the lightest shade into square brackets, for readers without colour.
        left_out: per token why it does not count, "" where it does; those stand in angle brackets (`marks_note`).
    """
    top = maximum if maximum else max(values, default=0.0)
    text = Text()
    for token, value, reason in zip(tokens, values, left_out or [""] * len(tokens), strict=True):
        shade, shown = level(value, top), visible(token)
        if brackets and shade:
            shown = f"[{shown}]"
        if reason:
            shown = MARK[0] + shown + MARK[1]
        style = None if shade is None else f"{'white' if shade == len(SHADES) - 1 else 'black'} on {SHADES[shade]}"
        text.append(shown, style=style)
    return text


def marks_note(reasons: Iterable[str], mark: str = " ".join(MARK)) -> str | None:
    """A sentence on the tokens that `shaded` marks, with the reasons that occur; None where there are none.

    Args:
        reasons: of all tokens that are shown, "" for those that count.
        mark: what marks them.
    """
    known = [reason for reason in dict.fromkeys(reasons) if reason]
    return f"{mark} marks tokens that do not count: {', '.join(known)}" if known else None


def legend(maximum: float) -> Text:
    """The scale of `shaded`."""
    text = Text("0 ")
    for i, shade in enumerate(SHADES):
        text.append("  ", style=f"{'white' if i == len(SHADES) - 1 else 'black'} on {shade}")
    return text.append(f" {maximum:.3g}")
