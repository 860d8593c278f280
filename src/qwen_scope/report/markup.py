"""HTML as a value: text is escaped here and nowhere else."""

from __future__ import annotations

from html import escape as escape_html

VOID = {"br", "hr", "img", "input", "meta", "link"}
"""Elements without an end."""


class Markup(str):
    """Text that is HTML already; only `element` and `join` make it from other text."""

    __slots__ = ()


Child = str | int | float | None
"""What an element may hold: `Markup` stays as it is, anything else is escaped, None is left out."""


def escaped(child: Child) -> Markup:
    """HTML that shows the child and does nothing else, whatever characters it holds.

    Braces, dollar signs and backticks become entities too, so that no template language can find work in it.
    """
    if child is None:
        return Markup("")
    if isinstance(child, Markup):
        return child
    text = escape_html(str(child), quote=True)
    for char in "{}$`\\":
        text = text.replace(char, f"&#{ord(char)};")
    return Markup(text)


def element(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """One element.

    Args:
        children: text or markup, in order.
        attributes: `class_` and `for_` lose their underscore, other underscores become hyphens; True stands without
            a value, False and None are left out.
    """
    shown = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        shown.append(f" {key}" if value is True else f' {key}="{escaped(str(value))}"')
    start = f"<{name}{''.join(shown)}>"
    return Markup(start if name in VOID else f"{start}{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Children one after the other."""
    return Markup("".join(escaped(child) for child in children))
