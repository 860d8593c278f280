"""One feature: where it fires, how often, how strongly. Its rows are neighbours in the table `features`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, Int64

from qwen_scope.errors import InputError, NotFoundError, check_count
from qwen_scope.text import PHASES

from .layout import ROW_GROUP
from .parts import TableRows
from .spans import Spans

# Up to this many rows of a feature are read at once to find its neighbours; beyond, each place is looked up.
AT_ONCE = 8 * ROW_GROUP


@dataclass(frozen=True)
class FeatureSummary:
    """How often and how strongly a feature fires in a store.

    Attributes:
        layer, feature: which.
        tokens, documents: on how many it fires.
        frequency: the share of the counted tokens.   document_frequency: the share of the documents.
        mean: mean activation over all counted tokens, zeros included.
        mean_active: mean over the tokens on which it fires, 0 if there are none.
        maximum, minimum: of the activations, 0 if there are none.
    """

    layer: int
    feature: int
    tokens: int
    documents: int
    frequency: float
    document_frequency: float
    mean: float
    mean_active: float
    maximum: float
    minimum: float


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many activations fall between neighbouring edges; the last bin includes its upper edge.

    Attributes:
        edges: `(bins + 1,)`, ascending.   counts: `(bins,)`.
    """

    edges: Float64[np.ndarray, " edges"]
    counts: Int64[np.ndarray, " bins"]


@dataclass(frozen=True)
class Context:
    """A place where a feature fires.

    Attributes:
        document, position: the place.   value: the activation there.
        start: the position of the first token shown.
        tokens: what the tokens around show, the place among them.   values: the feature's activation on each.
        phase: of the place, `text` outside conversations; empty where the store tells none.
        left_out: per token why it does not count at the layer, such as `first` or `sink`; "" where it counts. Those
            tokens are shown and have no activations.
    """

    document: int
    position: int
    value: float
    start: int
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    phase: str = "text"
    left_out: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where it is, in words."""
        phase = "" if self.phase in ("", "text") else f" ({self.phase})"
        return f"document {self.document}, position {self.position}{phase}"

    @property
    def text(self) -> str:
        """The tokens joined."""
        return "".join(self.tokens)


def summary(row: Mapping[str, Any], counted: int, documents: int) -> FeatureSummary:
    """A row of `stats`, with the rates that follow from it."""
    fires = row["tokens"]
    return FeatureSummary(
        layer=row["layer"],
        feature=row["feature"],
        tokens=fires,
        documents=row["documents"],
        frequency=fires / max(1, counted),
        document_frequency=row["documents"] / max(1, documents),
        mean=row["sum"] / max(1, counted),
        mean_active=row["sum"] / max(1, fires),
        maximum=row["maximum"],
        minimum=row["minimum"],
    )


def quantiles(features: TableRows, start: int, rows: int, shares: Sequence[float]) -> Float64[np.ndarray, " shares"]:
    """Per share the smallest activation that at least this share of the rows do not exceed.

    Raises:
        InputError: a share outside [0, 1].   NotFoundError: the feature never fires.
    """
    wanted = np.asarray(shares, np.float64)
    if not ((wanted >= 0) & (wanted <= 1)).all():
        raise InputError(f"quantiles are asked for by shares between 0 and 1, not {list(shares)}")
    if not rows:
        raise NotFoundError("the feature never fires in this store, so it has no quantiles")
    from_below = np.clip(np.ceil(wanted * rows - 1), 0, rows - 1).astype(np.int64)
    return features.take(start + rows - 1 - from_below, ["value"])["value"].to_numpy().astype(np.float64)


def histogram(features: TableRows, start: int, rows: int, bins: int | Sequence[float]) -> Histogram:
    """Counts of the values between edges, a row group at a time."""
    if isinstance(bins, int):
        check_count("bins", bins)
        top = float(features.read(start, 1, ["value"])["value"][0].as_py()) if rows else 1.0
        edges = np.linspace(0.0, top, bins + 1)
    else:
        edges = np.asarray(bins, np.float64)
        if len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise InputError("the edges of a histogram rise, and there are at least two")
    counts = np.zeros(len(edges) - 1, np.int64)
    for offset in range(0, rows, ROW_GROUP):
        piece = features.read(start + offset, min(ROW_GROUP, rows - offset), ["value"])
        counts += np.histogram(piece["value"].to_numpy().astype(np.float64), edges)[0]
    return Histogram(edges, counts)


def choose(rows: int, n: int, how: str, strata: int, seed: int) -> Int64[np.ndarray, " chosen"]:
    """Which of a feature's rows to show, counted from its strongest, in the order to show them.

    Raises:
        InputError: an unknown way, or fewer than one.
    """
    if how not in ("top", "random", "quantiles"):
        raise InputError(f"contexts are chosen by top, random or quantiles, not {how!r}")
    check_count("n", n)
    check_count("strata", strata)
    if how == "top":
        return np.arange(min(n, rows), dtype=np.int64)
    generator = np.random.default_rng(seed)
    if how == "random":
        return generator.choice(rows, min(n, rows), replace=False).astype(np.int64) if rows else np.zeros(0, np.int64)
    edges = [rows * i // strata for i in range(strata + 1)]
    chosen = []
    for i, (low, high) in enumerate(pairwise(edges)):
        share = n // strata + (i < n % strata)
        chosen.append(low + generator.choice(high - low, min(share, high - low), replace=False) if high > low else [])
    return np.sort(np.concatenate(chosen).astype(np.int64))


def within(
    features: TableRows, start: int, rows: int, spans: Spans, phases: Sequence[str]
) -> Int64[np.ndarray, " some"]:
    """Which of a feature's rows are of some phases, counted from its strongest."""
    found = [np.zeros(0, np.int64)]
    for offset in range(0, rows, ROW_GROUP):
        piece = features.read(start + offset, min(ROW_GROUP, rows - offset), ["document", "position"])
        document, position = (column.to_numpy() for column in piece.columns)
        found.append(offset + np.flatnonzero(spans.within(document, position, phases)))
    return np.concatenate(found)


def phase_counts(features: TableRows, start: int, rows: int, spans: Spans) -> dict[str, int]:
    """How many of a feature's rows are of which phase, in the order of `PHASES`, the phases without one left out."""
    found = np.zeros(len(PHASES) + 1, np.int64)
    for offset in range(0, rows, ROW_GROUP):
        piece = features.read(start + offset, min(ROW_GROUP, rows - offset), ["document", "position"])
        document, position = (column.to_numpy() for column in piece.columns)
        found += np.bincount(spans.phases(document, position) + 1, minlength=len(found))
    return {name: int(n) for name, n in zip(PHASES, found[1:], strict=True) if n}


def first_per_document(
    features: TableRows, start: int, rows: int, n: int, some: Int64[np.ndarray, " some"] | None = None
) -> Int64[np.ndarray, " chosen"]:
    """The strongest row of each of the `n` documents where the feature is strongest, or the strongest of some rows."""
    if some is not None:
        documents = features.take(start + some, ["document"])["document"].to_numpy()
        return some[np.sort(np.unique(documents, return_index=True)[1])[:n]]
    seen: dict[int, int] = {}
    for offset in range(0, rows, ROW_GROUP):
        piece = features.read(start + offset, min(ROW_GROUP, rows - offset), ["document"])["document"].to_numpy()
        documents, first = np.unique(piece, return_index=True)
        for at in np.sort(first):
            seen.setdefault(int(piece[at]), offset + int(at))
        if len(seen) >= n or len(documents) == 0:
            break
    return np.array(list(seen.values())[:n], np.int64)


def read(
    tables: Mapping[str, TableRows],
    spans: Spans,
    layer: int,
    feature: int,
    start: int,
    rows: int,
    chosen: Int64[np.ndarray, " chosen"],
    before: int,
    after: int,
) -> list[Context]:
    """The chosen rows of a feature with the tokens around them.

    Raises:
        InputError: a negative number of tokens around.
    """
    check_count("before", before, 0)
    check_count("after", after, 0)
    if not len(chosen):
        return []
    columns = ["document", "position", "value"]
    if rows <= AT_ONCE:
        everywhere = [c.to_numpy() for c in tables["features"].read(start, rows, columns).columns]
        document, position, value = (column[chosen] for column in everywhere)
    else:
        everywhere = None
        document, position, value = (c.to_numpy() for c in tables["features"].take(start + chosen, columns).columns)
    lengths = tables["documents"].take(document.astype(np.int64), ["first_token", "tokens"])
    first_token, length = (column.to_numpy() for column in lengths.columns)
    low, high = np.maximum(0, position - before), np.minimum(length, position + after + 1)
    words = np.concatenate([np.arange(f + a, f + b) for f, a, b in zip(first_token, low, high, strict=True)])
    texts = tables["tokens"].take(words.astype(np.int64), ["text"])["text"].to_pylist()
    phases = [PHASES[p] if p >= 0 else "" for p in spans.phases(document, position).tolist()]
    reasons = left_out(tables["masked"], layer, document, low, high)
    found, at = [], 0
    for i in range(len(chosen)):
        size = int(high[i] - low[i])
        where, how_much = around(tables["activations"], everywhere, layer, feature, int(document[i]))
        values = np.zeros(size)
        inside = (where >= low[i]) & (where < high[i])
        values[where[inside] - low[i]] = how_much[inside]
        tokens = tuple(texts[at : at + size])
        at += size
        place = int(document[i]), int(position[i]), float(value[i]), int(low[i])
        if not math.isclose(values[position[i] - low[i]], value[i]):
            raise NotFoundError(f"the two sort orders of the store differ at document {place[0]}, position {place[1]}")
        found.append(Context(*place, tokens, tuple(values.tolist()), phases[i], reasons[i]))
    return found


def silent(
    tables: Mapping[str, TableRows],
    layer: int,
    feature: int,
    start: int,
    rows: int,
    n: int,
    before: int,
    after: int,
    seed: int,
) -> list[Context]:
    """Random stretches of text without the feature, in different documents as far as there are enough."""
    for name, value, least in (("n", n, 1), ("before", before, 0), ("after", after, 0)):
        check_count(name, value, least)
    sizes = tables["documents"].read(0, tables["documents"].rows, ["first_token", "tokens"])
    first_token, length = (column.to_numpy() for column in sizes.columns)
    rng = np.random.default_rng(seed)
    firing = None
    if rows <= AT_ONCE:
        firing = [c.to_numpy() for c in tables["features"].read(start, rows, ["document", "position", "value"]).columns]
    found: list[Context] = []
    tried = np.concatenate([rng.permutation(len(length)) for _ in range(1 + 20 * n // max(1, len(length)))])
    for document in tried[: 50 * n].tolist():
        position = int(rng.integers(length[document]))
        low, high = max(0, position - before), min(int(length[document]), position + after + 1)
        where, _ = around(tables["activations"], firing, layer, feature, document)
        if ((where >= low) & (where < high)).any():
            continue
        texts = tables["tokens"].read(int(first_token[document]) + low, high - low, ["text"])["text"].to_pylist()
        ends = (np.array([value], np.int64) for value in (document, low, high))
        (reasons,) = left_out(tables["masked"], layer, *ends)
        found.append(Context(document, position, 0.0, low, tuple(texts), (0.0,) * (high - low), left_out=reasons))
        if len(found) == n:
            break
    return found


def left_out(
    masked: TableRows,
    layer: int,
    document: Int64[np.ndarray, " contexts"] | Int32[np.ndarray, " contexts"],
    low: Int64[np.ndarray, " contexts"] | Int32[np.ndarray, " contexts"],
    high: Int64[np.ndarray, " contexts"] | Int32[np.ndarray, " contexts"],
) -> list[tuple[str, ...]]:
    """Per token of contexts `[low, high)` why it does not count at a layer; "" where it counts."""
    groups = {group for one in np.unique(document).tolist() for group in masked.groups_of(layer, one)}
    known: dict[tuple[int, int], str] = {}
    for group in sorted(groups):
        table = masked.group(group, ["layer", "document", "position", "reason"])
        layers, documents, positions = (column.to_numpy() for column in table.columns[:3])
        here = np.flatnonzero((layers == layer) & np.isin(documents, document))
        places = zip(documents[here].tolist(), positions[here].tolist(), strict=True)
        known |= dict(zip(places, table["reason"].take(here).to_pylist(), strict=True))
    ends = zip(document.tolist(), low.tolist(), high.tolist(), strict=True)
    return [tuple(known.get((d, p), "") for p in range(a, b)) for d, a, b in ends]


def around(
    activations: TableRows, everywhere: list[np.ndarray] | None, layer: int, feature: int, document: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of a feature in one document."""
    if everywhere is not None:
        here = everywhere[0] == document
        return everywhere[1][here], everywhere[2][here]
    positions, values = [], []
    for group in activations.groups_of(layer, document):
        d, p, f, v = (
            c.to_numpy() for c in activations.group(group, ["document", "position", "feature", "value"]).columns
        )
        here = (d == document) & (f == feature)
        positions.append(p[here])
        values.append(v[here])
    return np.concatenate(positions), np.concatenate(values)
