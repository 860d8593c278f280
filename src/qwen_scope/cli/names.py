"""Names beside numbers: wherever a command prints the number of a feature, it prints what the feature is called.

One mechanism for all commands. What opens SAEs or a store says so with `know`; tables, their files and JSON pass
through `beside` and `within`, which add names to whatever holds features. No command looks names up for its tables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_scope.report import Table
    from qwen_scope.scope import Scope
    from qwen_scope.steer import Intervention
    from qwen_scope.store import FeatureStore

Names = Callable[[int, int], str]
"""By layer and feature what it is called, "" where it has no name."""

NAME = "name"
FEATURE = ("feature", "layer/feature", "fires most with")
"""The columns of a table that hold features."""
SPELLED = re.compile(r"(\d+)/(\d+)\b")
"""`LAYER/FEATURE`, whatever stands behind it in a cell."""
POINT = re.compile(r"(?:layers?[. ]?)?(\d+)(?:\.\w+)?")
"""A layer or a hook point as the key of an object."""

_KNOWN: ContextVar[list[Callable[[], Names]] | None] = ContextVar("known", default=None)


@contextmanager
def fresh() -> Iterator[None]:
    """Around a command: what it learns of names is forgotten at its end."""
    token = _KNOWN.set([])
    try:
        yield
    finally:
        _KNOWN.reset(token)


def know(source: Scope | FeatureStore | str | Names) -> None:
    """From now on features are called as a scope, a store or SAEs (by their name) have it; what is told first counts.

    Nothing is read before a feature is printed.
    """
    if (known := _KNOWN.get()) is not None:
        known.append(cache(lambda: opened(source)))


def of_store(folder: str | os.PathLike[str]) -> FeatureStore:
    """A store whose features are called from now on as its labels say."""
    from qwen_scope.store import FeatureStore

    store = FeatureStore(folder)
    know(store)
    return store


def opened(source: Any) -> Names:
    """The names that a source has."""
    from qwen_scope.features import names_of, names_of_saes, names_of_store
    from qwen_scope.scope import Scope
    from qwen_scope.store import FeatureStore

    if isinstance(source, str):
        return names_of_saes(source)
    if isinstance(source, Scope):
        return names_of(source)
    return names_of_store(source) if isinstance(source, FeatureStore) else source


def name(layer: int, feature: int) -> str:
    """What a feature is called, "" where nothing names it."""
    return next((said for one in _KNOWN.get() or () if (said := one()(layer, feature))), "")


def called(layer: int, feature: int) -> str:
    """A heading for one feature, with its name where it has one."""
    said = name(layer, feature)
    return f"Layer {layer}, feature {feature}{f': {said}' if said else ''}"


def beside(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], layer: int | None = None, *, always: bool = False
) -> tuple[Sequence[str], list[Sequence[Any]]]:
    """A table with the column `name` at its end, where it has features and any of them has a name.

    A table has features in its columns `layer` (or `hook point`) and `feature`, or in one column of `LAYER/FEATURE`.
    One with names of its own stays as it is.

    Args:
        layer: of the features of a table without the column `layer`.
        always: add the column although no row has a name, for tables that are joined; see `dropped`.
    """
    rows = list(rows)
    feature = next((one for one in FEATURE if one in columns), None)
    if not _KNOWN.get() or feature is None or any(one.startswith((NAME, "label")) for one in columns):
        return columns, rows
    at = columns.index(feature)
    place = next((columns.index(one) for one in ("layer", "hook point") if one in columns), None)
    said, here = [], layer
    for row in rows:
        if place is not None and row[place] is not None:  # a layer stands in the first of its rows alone
            here = _layer_of(row[place])
        said.append(_of_cell(here, row[at]))
    if not any(said) and not always:
        return columns, rows
    return (*columns, NAME), [(*row, one or None) for row, one in zip(rows, said, strict=True)]


def dropped(table: Table) -> Table:
    """A table without the column `name` at its end, where nothing in it has one."""
    if not table.columns or table.columns[-1] != NAME or any(row[-1] is not None for row in table.rows):
        return table
    return replace(table, columns=table.columns[:-1], rows=[row[:-1] for row in table.rows])


def of_changes(interventions: Iterable[Intervention]) -> dict[str, str]:
    """By `LAYER/FEATURE` what the features are called that interventions change; those without a name are left out.

    Interventions as JSON stay as recipes have them, without names, so these stand beside.
    """
    from qwen_scope.sae import feature_name

    places = dict.fromkeys((one.layer, one.feature) for one in interventions if one.feature is not None)
    return {feature_name(*place): said for place in places if (said := name(*place))}


def within(data: Any, layer: int | None = None) -> Any:
    """Plain data or dataclasses as JSON knows them, with `name` beside every `feature` that has one.

    `features` of an object with a `layer` get `names`, in their order, None where there is none.

    Args:
        layer: of features that say none, by the key they stand under.
    """
    if not _KNOWN.get():
        return data
    if is_dataclass(data) and not isinstance(data, type):
        data = {one.name: getattr(data, one.name) for one in fields(data)}
    if isinstance(data, Mapping):
        own = data.get("layer", layer)
        here = own if type(own) is int else None
        out: dict[Any, Any] = {}
        for key, value in data.items():
            out[key] = within(value, here if (of_key := _layer_of(key)) is None else of_key)
            if key == "feature" and NAME not in data and (said := _of_cell(here, value)):
                out[NAME] = said
            elif key == "features" and here is not None and "names" not in data and _numbers(value):
                said = [_of_cell(here, one) or None for one in value]
                out |= {"names": said} if any(said) else {}
        return out
    if isinstance(data, list | tuple):
        return [within(one, layer) for one in data]
    return data


def _of_cell(layer: Any, cell: Any) -> str:
    """The name of a feature by its number, or as `LAYER/FEATURE`."""
    if isinstance(cell, str) and (found := SPELLED.match(cell)):
        return name(int(found[1]), int(found[2]))
    return name(layer, cell) if type(layer) is int and type(cell) is int else ""


def _layer_of(key: Any) -> int | None:
    """The layer that a key of an object names, if it does."""
    if isinstance(key, int):
        return key
    found = POINT.fullmatch(key) if isinstance(key, str) else None
    return None if found is None else int(found[1])


def _numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(one) is int for one in value)
