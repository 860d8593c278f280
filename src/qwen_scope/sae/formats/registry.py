"""The layouts by name, one file and one line each, and the finding of SAEs among file names."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_scope.errors import FormatError, InputError, nearest

from .dictionary_learning import DICTIONARY_LEARNING
from .layout import Entry, Layout
from .official import OFFICIAL, SAFETENSORS
from .open_interpretability import OPEN_INTERPRETABILITY
from .sae_lens import SAE_LENS
from .scope_code import SCOPE_CODE
from .sparsify import SPARSIFY

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        OFFICIAL,
        SAFETENSORS,
        SAE_LENS,
        SPARSIFY,
        DICTIONARY_LEARNING,
    )
}
"""The layouts that are read and written."""

READABLE: dict[str, Layout] = LAYOUTS | {
    layout.name: layout
    for layout in (
        OPEN_INTERPRETABILITY,
        SCOPE_CODE,
    )
}
"""All layouts: further ones, of single releases, are only read."""


def layout_named(name: str) -> Layout:
    """The layout of that name, to be written; raises InputError with the nearest names."""
    if name in READABLE and name not in LAYOUTS:
        raise InputError(f"the layout {name} is only read; write one of {', '.join(LAYOUTS)}")
    if name not in LAYOUTS:
        raise InputError(f"there is no layout {name!r}; {nearest(name, LAYOUTS)}")
    return LAYOUTS[name]


def find_entries(names: Sequence[str], where: str) -> list[Entry]:
    """The SAEs among the file `names` of `where`, by layer; they must all be of one layout.

    Raises:
        FormatError: the files are of no known layout, or of several.
    """
    names = sorted(names)
    found = {name: entries for name, layout in READABLE.items() if (entries := layout.entries(names))}
    if len(found) > 1:
        examples = " and ".join(f"{name} ({entries[0].weights})" for name, entries in found.items())
        raise FormatError(f"{where} holds SAEs in several layouts, {examples}; name one file, or part them")
    if not found:
        raise FormatError(f"{where} holds no SAE in a known layout ({', '.join(READABLE)}); {missing(names)}")
    (entries,) = found.values()
    return sorted(entries, key=lambda e: (e.layer is None, e.layer or 0, e.weights))


def missing(names: Sequence[str]) -> str:
    """What stands in the way: weights without the config they need, or what there is instead."""
    for name in names:
        for layout in READABLE.values():
            if layout.config_needed and (match := layout.weights.fullmatch(name)):
                return f"{name} needs {' or '.join(layout.config_of(match))} beside it"
    return "it holds " + (", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing")
