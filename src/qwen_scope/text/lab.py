"""The lab as a source: `lab`, or `lab:language=de,register!=rude` for documents with some factors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from qwen_scope.errors import InputError

from .read import Raw, Source, same

LAB = "lab"
FACTORS = ("kind", "language", "register")


def is_lab(source: Any) -> bool:
    """Whether a source is the lab, with or without conditions: endless documents, unless a number is asked for."""
    return isinstance(source, str | os.PathLike) and str(os.fspath(source)).partition(":")[0] == LAB


def conditions(text: str) -> list[tuple[str, str, bool]]:
    """`language=de,register!=rude` as (column, value, equal).

    Raises:
        InputError: anything else.
    """
    out = []
    for part in text.split(","):
        column, sign, value = part.partition("=")
        if not sign or not column.strip("! "):
            raise InputError(f"{part!r} is no condition on metadata; write `column=value` or `column!=value`")
        out.append((column.strip().removesuffix("!").strip(), value.strip(), not column.rstrip().endswith("!")))
    return out


def lab_source(source: str, split: str, seed: int, n: int | None) -> Source:
    """Documents of the lab, each with its factors as metadata; those that meet the conditions behind `lab:`.

    Conditions that don't name a kind leave out the kinds without a language and a register.

    Raises:
        InputError: a condition that is none, or on something else than a factor.   NotFoundError: no such split.
    """
    from qwen_scope.lab import documents

    _, behind, text = source.partition(":")
    chosen = factors(conditions(text) if behind else ())
    stream = partial(documents, split, seed, **chosen)
    stream(n=1)  # raises for a split that does not exist

    def rows(before: int, offset: int) -> Iterator[Raw]:
        for i, d in enumerate(islice(stream(n=n), before, None), before + 1):
            meta = {"id": d.id, "kind": d.kind, "language": d.language, "register": d.register, **d.factors}
            yield Raw(i, i, partial(same, {"text": d.text, **meta}))

    # Documents are made one after the other: what stands before a place is made again.
    return Source(f"{source}:{split}:{seed}:{n}", n, rows, n, "stream" if n is None else "first")


def factors(asked: Iterable[tuple[str, str, bool]]) -> dict[str, list[str]]:
    """Conditions on the lab's factors as the values that remain of each, by the names of `lab.documents`."""
    from qwen_scope.lab import KINDS, LANGUAGES, REGISTERS

    known = dict(zip(FACTORS, (KINDS, LANGUAGES, REGISTERS), strict=True))
    chosen: dict[str, list[str]] = {}
    for name, value, equal in asked:
        if name not in known:
            raise InputError(f"the lab's factors are {', '.join(known)}, not {name!r}")
        if value not in known[name]:
            raise InputError(f"a {name} of the lab is one of {', '.join(known[name])}, not {value!r}")
        chosen[name] = [one for one in chosen.get(name, known[name]) if (one == value) is equal]
    if "kind" not in chosen and chosen:
        chosen["kind"] = ["talk"]
    return {f"{name}s": values for name, values in chosen.items()}
