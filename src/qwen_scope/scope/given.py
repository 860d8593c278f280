"""What people hand over where texts or layers are wanted: one or many, in whatever their notebook holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from qwen_scope.errors import InputError, brief
from qwen_scope.model import HookPoint
from qwen_scope.sae import numbers_in
from qwen_scope.text import Message

# One or many, in a list, an array or a Series.
Texts = str | Sequence[str | Sequence[Message]] | Any
Layers = int | str | Sequence[int] | None | Any


def items_of(values: Any) -> list[Any]:
    """The items of a list, an array, a Series of pandas or polars, or an Arrow column, as Python's own objects."""
    for way in ("to_pylist", "to_list", "tolist"):
        if hasattr(values, way):
            found = getattr(values, way)()
            return found if isinstance(found, list) else [found]
    return list(values)


def as_texts(texts: Any) -> list[Any]:
    """One text, one conversation (a list of messages), or many of them, as a list.

    Raises:
        InputError: something that is no text, such as a missing value of a column.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, Mapping | bytes) or not isinstance(texts, Iterable):
        raise InputError(f"a text, or a list, Series or array of texts, not {type(texts).__name__}")
    found = items_of(texts)
    if found and all(isinstance(one, Mapping) for one in found):
        return [found]
    for i, one in enumerate(found):
        if not isinstance(one, str | list | tuple):
            raise InputError(f"text {i} is {brief(repr(one))}, not a text; drop missing values first")
    return found


def is_one(texts: Any) -> bool:
    """Whether `as_texts` makes a list of what is a single text or conversation."""
    return isinstance(texts, str) or (
        isinstance(texts, list | tuple) and bool(texts) and all(isinstance(one, Mapping) for one in texts)
    )


def as_layers(layers: Any) -> list[int] | None:
    """One layer or many: numbers, or text as `parse_layers` reads it; None stays None.

    Raises:
        InputError: anything else.
    """
    if layers is None or isinstance(layers, str):
        return None if layers is None else parse_layers(layers)
    found = [layers] if isinstance(layers, Integral) or not isinstance(layers, Iterable) else items_of(layers)
    out: list[int] = []
    for one in found:
        if isinstance(one, str) and (read := parse_layers(one)) is not None:
            out += read
        elif isinstance(one, Integral) and not isinstance(one, bool):
            out.append(int(one))
        else:
            raise InputError(f"layers are numbers such as 3 or [0, 2], or text such as '0,2-5', not {brief(repr(one))}")
    return out


def parse_layers(text: str) -> list[int] | None:
    """`0,2-5` as a list of layers, `layer3` and `layers.3.resid_post` too; `all` means all.

    Raises:
        InputError: anything else.
    """
    if text.strip() == "all":
        return None
    layers: set[int] = set()
    for part in text.split(","):
        if (found := numbers_in(part)) is not None:
            layers.update(found)
            continue
        point = HookPoint.parse(part.strip())
        if point.stream != "resid_post":
            raise InputError(
                f"layers= takes the number of a layer, {point.layer} for {part.strip()!r}: the SAE's files say which"
                " stream it reads"
            )
        layers.add(point.layer)
    return sorted(layers)
