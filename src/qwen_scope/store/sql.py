"""Questions about many features at once, as SQL over the tables of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_scope.errors import InputError, check_count

Query = tuple[str, dict[str, Any]]

# Where a document is of the phases asked for.
_INSIDE = """inside AS (
  SELECT document, position AS start, position + tokens AS stop FROM spans
  WHERE list_contains($phases::VARCHAR[], phase))"""


def _within(table: str, phases: bool) -> str:
    """A table with a position, or those of its rows that are of the phases asked for."""
    if not phases:
        return table
    return (
        f"(SELECT t.* FROM {table} t JOIN inside ON t.document = inside.document"
        " AND t.position >= inside.start AND t.position < inside.stop)"
    )


def _counted(phases: bool) -> str:
    """Tokens that count, per layer and document. `masked` is usually a sliver of `tokens`."""
    documents = (
        "(SELECT document, sum(stop - start) AS tokens FROM inside GROUP BY document)" if phases else "documents"
    )
    return f"""counted AS (
  SELECT l.layer, d.document, d.tokens - coalesce(m.masked, 0) AS tokens
  FROM {documents} d CROSS JOIN (SELECT unnest($layers::INTEGER[]) AS layer) l
  LEFT JOIN (SELECT layer, document, count(*) AS masked FROM {_within("masked", phases)} GROUP BY ALL) m
  USING (layer, document))"""


def _last(phases: bool) -> str:
    """The last token that counts, per layer and document."""
    return f"""last AS (
  SELECT layer, document, max(position) AS position
  FROM (SELECT l.layer, t.document, t.position
        FROM {_within("tokens", phases)} t CROSS JOIN (SELECT unnest($layers::INTEGER[]) AS layer) l)
  ANTI JOIN masked USING (layer, document, position) GROUP BY layer, document)"""


REDUCTIONS = {
    "any": "SELECT document, layer, feature, 1::FLOAT AS value, min(position) AS position FROM chosen GROUP BY ALL",
    "max": "SELECT document, layer, feature, best.value AS value, -best.back AS position FROM (SELECT document, layer,"
    " feature, max({'value': value, 'back': -position}) AS best FROM chosen GROUP BY ALL)",
    "mean": "SELECT document, layer, feature, (sum(value::DOUBLE) / any_value(counted.tokens))::FLOAT AS value,"
    " -1::INTEGER AS position FROM chosen JOIN counted USING (layer, document) GROUP BY document, layer, feature",
    "last": "SELECT document, layer, feature, value, position FROM chosen JOIN last USING (layer, document, position)",
}


def firing_query(
    reduction: str,
    layers: Sequence[int],
    features: Sequence[int] | None,
    documents: Sequence[int] | None,
    phases: Sequence[str] | None = None,
) -> Query:
    """The `Firing` table; see `FeatureStore.firing`.

    Raises:
        InputError: an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise InputError(f"a reduction is one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    params: dict[str, Any] = {"layers": list(layers)}
    where = "list_contains($layers::INTEGER[], layer)"
    # One layer, one feature and one document are by far the most frequent, and plain comparisons skip row groups.
    for name, chosen in (("feature", features), ("document", documents)):
        if chosen is not None:
            params |= {
                name + "s": list(chosen),
                "low_" + name: min(chosen, default=0),
                "high_" + name: max(chosen, default=0),
            }
            where += f" AND {name} BETWEEN $low_{name} AND $high_{name} AND list_contains(${name}s::INTEGER[], {name})"
    params |= {"low": min(layers, default=0), "high": max(layers, default=0)}
    where += " AND layer BETWEEN $low AND $high"
    table = "features" if features is not None and documents is None else "activations"
    some = phases is not None
    tables = [_INSIDE] if some else []
    params |= {"phases": list(phases)} if phases is not None else {}
    tables.append(f"chosen AS (SELECT * FROM {_within(f'(SELECT * FROM {table} WHERE {where})', some)})")
    tables += {"mean": [_counted(some)], "last": [_last(some)]}.get(reduction, [])
    return f"WITH {', '.join(tables)} {REDUCTIONS[reduction]} ORDER BY document, layer, feature", params


def rows_of(n: int | None) -> int:
    """The most rows of an answer; None stands for all.

    Raises:
        InputError: a number that is none from 1 up.
    """
    return 2**62 if n is None else check_count("n", n)


def cofiring_query(layer: int, feature: int, other: int, n: int | None) -> Query:
    """Features of the layer `other` on the tokens where this one fires."""
    query = """
        WITH mine AS (SELECT document, position FROM features WHERE layer = $layer AND feature = $feature),
        shared AS (
          SELECT feature, count(*) AS "both" FROM (SELECT * FROM activations WHERE layer = $other)
          SEMI JOIN mine USING (document, position) GROUP BY feature)
        SELECT feature, "both", stats.tokens,
          "both"::DOUBLE / (stats.tokens + (SELECT count(*) FROM mine) - "both") AS jaccard
        FROM shared JOIN (SELECT feature, tokens FROM stats WHERE layer = $other) stats USING (feature)
        WHERE NOT (feature = $feature AND $other = $layer) ORDER BY jaccard DESC, feature LIMIT $n"""
    return query, {"layer": layer, "feature": feature, "other": other, "n": rows_of(n)}


def document_query(document: int, layer: int, n: int | None) -> Query:
    """The features of one document at one layer."""
    query = """
        SELECT feature, best.value AS maximum, -best.back AS position, tokens, "sum" FROM (
          SELECT feature, max({'value': value, 'back': -position}) AS best, count(*) AS tokens,
            sum(value::DOUBLE) AS "sum"
          FROM activations WHERE layer = $layer AND document = $document GROUP BY feature)
        ORDER BY maximum DESC, feature LIMIT $n"""
    return query, {"layer": layer, "document": document, "n": rows_of(n)}


def documents_query(layer: int, feature: int, n: int | None) -> Query:
    """The documents where a feature fires."""
    query = """
        SELECT document, max(value) AS maximum, count(*) AS tokens FROM features
        WHERE layer = $layer AND feature = $feature GROUP BY document ORDER BY maximum DESC, document LIMIT $n"""
    return query, {"layer": layer, "feature": feature, "n": rows_of(n)}
