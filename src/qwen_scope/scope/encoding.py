"""One window of a corpus: read by the model sorted by length, encoded layer by layer, and put back in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from qwen_scope.model import HookPoint
from qwen_scope.sae import SAE
from qwen_scope.store import TABLES, LayerRows, Window
from qwen_scope.text import REASONS, Counted

from .engine import Engine
from .prefetch import ahead, in_turn
from .rows import Pieces, Row

# Residuals that wait for their SAEs, together, in bytes.
HOLD_BYTES = 2**28
SINK = REASONS.index("sink")


Part = tuple[int, int, int]
"""Tokens of one row: the row, its first token, and the one after its last."""


def residuals(
    engine: Engine, points: Sequence[HookPoint], rows: Sequence[Row]
) -> Iterator[tuple[list[Part], dict[int, Tensor]]]:
    """Per batch which tokens it has, and per layer their residuals one after the other, without leads."""
    read = [0] * len(rows)  # with its lead; a long row comes in pieces
    for batch, found in engine.activations([[*row.lead, *row.ids] for row in rows], points):
        by_layer = {point.layer: h for point, h in found.items()}
        parts, own = [], []
        for i in batch:
            lead, whole = len(rows[i].lead), len(rows[i].lead) + len(rows[i].ids)
            until = whole if len(batch) > 1 else read[i] + len(next(iter(by_layer.values())))
            parts.append((i, max(0, read[i] - lead), max(0, until - lead)))
            own.append(np.arange(read[i], until) >= lead)
            read[i] = until
        if not all(flags.all() for flags in own):
            kept = torch.from_numpy(np.concatenate(own))
            by_layer = {layer: h[kept.to(h.device)] for layer, h in by_layer.items()}
        yield parts, by_layer


def held(
    found: Iterator[tuple[list[Part], dict[int, Tensor]]], hold_bytes: int, report: Callable[[int], None]
) -> Iterator[list[tuple[list[Part], dict[int, Tensor]]]]:
    """Batches in lists whose residuals are together as large as `hold_bytes`, or one batch."""
    batches, size, done = [], 0, 0
    for parts, by_layer in found:
        batches.append((parts, by_layer))
        size += sum(h.numel() * h.element_size() for h in by_layer.values())
        done += len(next(iter(by_layer.values())))
        report(done)
        if size >= hold_bytes:
            yield batches
            batches, size = [], 0
    if batches:
        yield batches


def elsewhere(model: nn.Module, saes: Mapping[int, SAE], device: torch.device | str | None) -> bool:
    """Whether model and SAEs work on different devices, so that neither has to wait for the other."""
    at_work = {next(model.parameters()).device.type}
    return at_work.isdisjoint({torch.device(device).type} if device else {saes[layer].device.type for layer in saes})


def points_of(saes: Mapping[int, SAE]) -> dict[int, HookPoint]:
    """Where the SAEs read, in their order."""
    return {layer: HookPoint.read_by(sae.hook_point, layer) for layer, sae in saes.items()}


def reasons_of(rows: Sequence[Row], counted: Counted) -> np.ndarray:
    """Per token of the rows why it is left out at every layer, `(tokens,)`: an index into `REASONS`, 0 where it counts.

    Its place is that in the row as the model reads it, with the lead.
    """
    ids = torch.tensor([i for row in rows for i in row.ids], dtype=torch.int64)
    positions = [torch.arange(len(row.ids)) + len(row.lead) for row in rows]
    phases = None
    if counted.phases is not None:
        phases = torch.tensor([p for row in rows for p in row.phases or ()], dtype=torch.int64)
    return counted.reasons(ids, torch.cat(positions) if rows else ids, phases).numpy()


def encode_window(
    engine: Engine,
    saes: Mapping[int, SAE],
    pieces: Pieces,
    *,
    counted: Counted,
    pool: Sequence[str],
    carried: Mapping[str, Any],
    report: Callable[[int], None],
    at_once: Callable[[], bool] = lambda: False,
    device: torch.device | str | None = None,
    hold_bytes: int = HOLD_BYTES,
) -> tuple[Window, dict[str, Any]]:
    """The window as tables, and the pooled residuals of a document that goes on in the next one.

    Args:
        counted: which tokens count; the others have no activations and are not pooled.
        report: called with the number of tokens that the model has read.
        at_once: whether the model reads while SAEs encode.
        device: where SAEs come for their turn, or None where they are.
        hold_bytes: about how many bytes of residuals wait for their SAEs, or one batch of them.
    """
    rows, points = pieces.rows, points_of(saes)
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.array([i for row in rows for i in row.ids], np.int64)
    document = np.repeat(np.array([row.document for row in rows], np.int32), lengths)
    position = np.arange(first[-1]) - np.repeat(first[:-1] - np.array([r.start for r in rows], np.int64), lengths)
    position = position.astype(np.int32)
    everywhere = reasons_of(rows, counted)
    layers = {layer: LayerWindow(everywhere) for layer in saes}
    pools = {layer: Pools(carried.get(str(layer))) for layer in saes} if pool else {}

    def encode(layer: int, sae: SAE, batches: list[tuple[list[Part], dict[int, Tensor]]]) -> None:
        kept, tokens = [], []
        for parts, found in batches:
            h = found.pop(layer)
            here = np.concatenate([first[i] + np.arange(start, stop) for i, start, stop in parts])
            keep = layers[layer].judge(here, counted.sinks(h, points[layer]).cpu().numpy())
            if keep.any():
                kept.append(h if keep.all() else h[torch.from_numpy(np.flatnonzero(keep)).to(h.device)])
                tokens.append(here[keep])
            if pool:
                pools[layer].add(parts, h, keep)
        if kept:
            acts = sae.encode(torch.cat(kept)).to("cpu")
            layers[layer].add(np.concatenate(tokens), acts.indices.numpy(), acts.values.float().numpy())

    made_of = held(residuals(engine, list(points.values()), rows), hold_bytes, report)
    with ahead(made_of, at_once) as waiting:
        for batches in waiting:
            for layer, sae in in_turn(saes, device):
                encode(layer, sae, batches)
                del sae
    tables = {
        "documents": document_table(pieces, first),
        "spans": pa.Table.from_pylist(pieces.spans, schema=TABLES["spans"]),
        "tokens": token_table(document, position, ids, [text for row in rows for text in row.texts]),
        "masked": pa.concat_tables([masked_rows(i, document, position, w.reasons) for i, w in layers.items()]),
        "unreadable": pa.Table.from_pylist([asdict(bad) for bad in pieces.unreadable], schema=TABLES["unreadable"]),
        "residuals": TABLES["residuals"].empty_table(),
    }
    going_on = {}
    if pool:
        found_pools = [pools[layer].finish(layer, rows, pool) for layer in saes]
        tables["residuals"] = pa.concat_tables([table for table, _ in found_pools])
        going_on = {str(layer): rest for layer, (_, rest) in zip(saes, found_pools, strict=True) if rest is not None}
    return Window({layer: window.rows(document, position) for layer, window in layers.items()}, tables), going_on


class LayerWindow:
    """The activations of one layer, collected batch by batch.

    Args:
        reasons: why tokens are left out at every layer, `(tokens,)`; sinks of this layer are added in `judge`.
    """

    def __init__(self, reasons: np.ndarray) -> None:
        self.reasons = reasons.copy()
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def judge(self, tokens: np.ndarray, sinks: np.ndarray) -> np.ndarray:
        """Which of some tokens count, `(n,)` bool; `sinks` tells where their residuals are too long."""
        found = self.reasons[tokens]
        self.reasons[tokens] = np.where((found == 0) & sinks, SINK, found)
        return self.reasons[tokens] == 0

    def add(self, tokens: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
        """Active slots of some tokens: `(n,)`, `(n, k)`, `(n, k)`."""
        on = values > 0
        self.parts.append((np.repeat(tokens, on.sum(-1)), indices[on], values[on]))

    def rows(self, document: np.ndarray, position: np.ndarray) -> LayerRows:
        """Sorted by token and feature."""
        if self.parts:
            token, feature, value = (np.concatenate(column) for column in zip(*self.parts, strict=True))
        else:
            token, feature, value = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
        order = np.argsort(token << 32 | feature, kind="stable")
        token, feature, value = token[order], feature[order].astype(np.int32), value[order].astype(np.float32)
        return LayerRows(document[token], position[token], feature, value, int((self.reasons == 0).sum()))


class Pools:
    """Pooled residuals of one layer: per row of tokens, then per document in order."""

    def __init__(self, carried: Mapping[str, Any] | None) -> None:
        self.found: dict[int, tuple[np.ndarray, int, np.ndarray | None]] = {}
        self.carried = copy.copy(carried)

    def add(self, parts: Sequence[Part], h: Tensor, keep: np.ndarray) -> None:
        """Sum, count and last of the counted residuals of each row of a batch."""
        kept = torch.from_numpy(keep).to(h.device)
        at = 0
        for i, start, stop in parts:
            some = h[at : at + stop - start][kept[at : at + stop - start]]
            at += stop - start
            total, count, last = self.found.get(i, (0.0, 0, None))
            last = some[-1].float().cpu().numpy() if len(some) else last
            self.found[i] = total + some.float().cpu().double().sum(0).numpy(), count + len(some), last

    def finish(self, layer: int, rows: Sequence[Row], pool: Sequence[str]) -> tuple[pa.Table, dict[str, Any] | None]:
        """Rows of `residuals` for the documents that end here, and what goes over to the next window."""
        out: list[dict[str, Any]] = []
        held: Any = self.carried
        for i, row in enumerate(rows):
            total, count, last = self.found[i]
            if held is not None:
                total, count = np.array(held["sum"]) + total, held["count"] + count
                last = last if last is not None else held["last"]
            if not row.ends:
                kept = None if last is None else np.asarray(last, np.float32).tolist()
                held = {"sum": total.tolist(), "count": int(count), "last": kept}
                continue
            held = None
            if count:
                vectors = {"mean": total / count, "last": last}
                out += [
                    {
                        "layer": layer,
                        "document": row.document,
                        "pooling": name,
                        "vector": np.asarray(vectors[name], np.float32),
                    }
                    for name in pool
                ]
        return pa.Table.from_pylist(out, schema=TABLES["residuals"]), held


def masked_rows(layer: int, document: np.ndarray, position: np.ndarray, reasons: np.ndarray) -> pa.Table:
    """Rows of `masked` for one layer."""
    at = np.flatnonzero(reasons)
    columns = [np.full(len(at), layer, np.int32), document[at], position[at]]
    named = [REASONS[reason] for reason in reasons[at].tolist()]
    arrays = [*(pa.array(column) for column in columns), pa.array(named, pa.string())]
    return pa.Table.from_arrays(arrays, schema=TABLES["masked"])


def token_table(document: np.ndarray, position: np.ndarray, ids: np.ndarray, texts: list[str]) -> pa.Table:
    """Rows of `tokens`."""
    columns = [document, position, ids.astype(np.int32)]
    arrays = [*(pa.array(column) for column in columns), pa.array(texts, pa.string())]
    return pa.Table.from_arrays(arrays, schema=TABLES["tokens"])


def document_table(pieces: Pieces, first: np.ndarray) -> pa.Table:
    """Rows of `documents` that begin in this window."""
    before = pieces.after.tokens - int(first[-1])
    starts = {row.document: before + int(at) for row, at in zip(pieces.rows, first[:-1], strict=True) if row.start == 0}
    entries = [{**entry, "first_token": starts[entry["document"]]} for entry in pieces.documents]
    return pa.Table.from_pylist(entries, schema=TABLES["documents"])
