"""One table of labelled documents: its two sets, and its rows given back with what a rule or a student says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qwen_scope.errors import InputError

from . import names, options

if TYPE_CHECKING:
    from qwen_scope.report import Table
    from qwen_scope.text import CorpusOptions, Document


def sides(source: str, label: str, reading: CorpusOptions) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """What the label is called, and the rows of a table with it and without it; rows without any label are left out.

    Args:
        label: `column=value`, or a column that holds true and false or 1 and 0.

    Raises:
        InputError: no row with the label or none without it, or a column that is none of both.
    """
    from qwen_scope.analysis import as_truth
    from qwen_scope.text import conditions

    column, value, equal = conditions(label)[0] if "=" in label else (label.strip(), None, True)
    having: list[dict[str, Any]] = []
    lacking: list[dict[str, Any]] = []
    columns: set[str] = set()
    for document in options.read(source, reading):
        columns |= document.meta.keys()
        held = document.meta.get(column)
        if held is None or held == "":
            continue
        if value is None:
            try:
                with_it = as_truth(document, column)
            except InputError as error:
                raise InputError(f"{error}; for a column of several classes name one: --label {column}=CLASS") from None
        else:
            with_it = (str(held) == value) is equal
        (having if with_it else lacking).append(row_of(document, reading))
    if not (having and lacking):
        empty = "with" if not having else "without"
        said = f"; its columns are {', '.join(sorted(columns))}" if column not in columns else ""
        raise InputError(f"no row of {source} is labelled as one {empty} {label}{said}")
    return value or column, having, lacking


def row_of(document: Document, reading: CorpusOptions) -> dict[str, Any]:
    """The row that a document was read from: its columns, and its text where that is one of them."""
    return document.meta if reading.template is not None else {reading.column: document.text, **document.meta}


def added(rows: Iterable[tuple[Document, Mapping[str, Any]]], name: str, reading: CorpusOptions) -> Table:
    """The user's rows with the columns `NAME_predicted`, `NAME_score` and `NAME_because` (which feature fired where).

    Raises:
        InputError: the rows have such a column already.
    """
    from qwen_scope.report import Table

    out = []
    for document, said in rows:
        more = {"predicted": said["label"], "score": said["score"]}
        if "because" in said:
            more["because"] = "; ".join(map(because, said["because"]))
        mine = {f"{name}_{key}": value for key, value in more.items()}
        row = row_of(document, reading)
        if taken := row.keys() & mine.keys():
            raise InputError(f"the rows have a column {min(taken)!r} already; rename it, or the rule with --name")
        out.append({**row, **mine})
    return Table.of(f"Rows with {name}", out)


def because(evidence: Mapping[str, Any]) -> str:
    """A feature, by its name too where it has one, and the token it fired on."""
    layer, feature = evidence["layer"], evidence["feature"]
    called = names.name(layer, feature)
    return f"{layer}/{feature}{f' {called}' if called else ''} on {evidence['token']!r}"
