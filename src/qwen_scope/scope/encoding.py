"""One window of a corpus: documents cut into rows, read by the model sorted by length, and put back in order."""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, LoadedModel, TokenMask, capture
from qwen_scope.sae import SAE
from qwen_scope.store import TABLES, LayerRows, Window
from qwen_scope.text import Corpus, Document, Unreadable, by_length, chunks, meta_json, padded, start_ids

from .prefetch import ahead, in_turn

# Residuals that wait for their SAEs, together, in bytes.
HOLD_BYTES = 2**28


@dataclass(frozen=True)
class State:
    """From where the next window is made: plain data.

    Attributes:
        cursor: of the corpus, before the document that is not whole yet.
        done: how many tokens of that document are in the store.
        documents, tokens: how many are in the store; the unfinished document counts.
        medians: per layer the median norm of the first window, once it is known.
        carried: per layer sum, count and last residual of the unfinished document.
        window: tokens of the next window, 0 where it is not said.
    """

    cursor: dict[str, int]
    done: int = 0
    documents: int = 0
    tokens: int = 0
    medians: dict[str, float] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)
    window: int = 0


@dataclass(frozen=True, eq=False)
class Row:
    """Consecutive tokens of one document, read by the model together.

    Attributes:
        lead: what the model reads before them, and nobody keeps: a row that begins within a document begins with what
            the tokenizer puts before a text, such as a BOS.
    """

    document: int
    start: int
    ids: list[int]
    texts: list[str]
    ends: bool
    lead: list[int]


@dataclass(frozen=True, eq=False)
class Pieces:
    """What a window is made of, and the state after it (without medians and carried residuals)."""

    rows: list[Row]
    documents: list[dict[str, Any]]
    unreadable: list[Unreadable]
    after: State


class Reader:
    """Documents as rows of tokens, a window at a time.

    Attributes:
        state: of the last window.   documents: begun so far.   unreadable: rows of this window that could not be used.
    """

    def __init__(
        self,
        corpus: Corpus,
        loaded: LoadedModel,
        state: State,
        row_tokens: int,
        max_tokens: int | None,
        chat: str | None,
    ) -> None:
        self.corpus, self.tokenizer, self.state = corpus, loaded.tokenizer, state
        self.row_tokens, self.max_tokens, self.chat = row_tokens, max_tokens, chat
        self.lead = start_ids(loaded.tokenizer)
        corpus.seek(state.cursor)
        self.stream = corpus.rows()
        self.tokens = state.tokens
        self.documents = state.documents - (state.done > 0)
        self.skip = state.done
        self.unreadable: list[Unreadable] = []
        # The document being cut into rows: the cursor before it, its rows not yet given out.
        self.before, self.waiting = state.cursor, iter(())

    def window(self, tokens: int) -> Pieces:
        """The next rows, until there are `tokens` of them."""
        rows: list[Row] = []
        entries: list[dict[str, Any]] = []
        self.unreadable = []
        held = 0
        while held < tokens:
            row = next(self.waiting, None)
            if row is None:
                self.before = self.corpus.cursor()
                found = next(self.stream, None)
                if found is None:
                    break
                if isinstance(found, Document):
                    self._begin(found, entries)
                else:
                    self.unreadable.append(found)
                continue
            rows.append(row)
            held += len(row.ids)
        self.tokens += held
        unfinished = bool(rows) and not rows[-1].ends
        after = State(
            cursor=self.before if unfinished else self.corpus.cursor(),
            done=rows[-1].start + len(rows[-1].ids) if unfinished else 0,
            documents=self.documents,
            tokens=self.tokens,
        )
        return Pieces(rows, entries, list(self.unreadable), after)

    def _begin(self, document: Document, entries: list[dict[str, Any]]) -> None:
        """Tokenise a document, a chunk at a time: beside its text only what is kept of it is held, as numbers.

        Rows that are in the store already are not given out again.
        """
        ids, texts, total = array("i"), [], 0
        same: dict[str, str] = {}
        try:
            for part in chunks(self.tokenizer, document, chat=self.chat):
                room = len(part.ids) if self.max_tokens is None else max(0, self.max_tokens - len(ids))
                ids.extend(part.ids[:room])
                # Most tokens of a long text show what others show.
                texts += [same.setdefault(text, text) for text in part.strings[:room]]
                total += len(part.ids)
        except InputError as error:
            self.unreadable.append(Unreadable(document.source, document.row, "no tokens", str(error)[:500]))
            return
        skip, self.skip = self.skip, 0
        if not skip:
            entries.append(
                {
                    "document": self.documents,
                    "tokens": len(ids),
                    "cut": total - len(ids),
                    "source": document.source,
                    "row": document.row,
                    "meta": meta_json(document.meta),
                }
            )
        number, self.documents = self.documents, self.documents + 1
        starts = range(0, len(ids), self.row_tokens)
        self.waiting = (
            Row(
                number,
                s,
                ids[s : s + self.row_tokens].tolist(),
                texts[s : s + self.row_tokens],
                s + self.row_tokens >= len(ids),
                self.lead if s else [],
            )
            for s in starts
            if s >= skip
        )


def residuals(
    model: nn.Module, points: Sequence[HookPoint], rows: Sequence[Row], batch_tokens: int
) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
    """Per batch which rows it has, and per layer the residuals of their tokens one after the other."""
    for batch in by_length([len(row.lead) + len(row.ids) for row in rows], batch_tokens):
        ids, mask = padded([[*rows[i].lead, *rows[i].ids] for i in batch])
        found = capture(model, ids, points, mask)
        kept = mask.bool()
        for line, i in enumerate(batch):
            kept[line, : len(rows[i].lead)] = False
        yield batch, {point.layer: h[kept.to(h.device)] for point, h in found.items()}


def held(
    found: Iterator[tuple[list[int], dict[int, Tensor]]], hold_bytes: int, report: Callable[[int], None]
) -> Iterator[list[tuple[list[int], dict[int, Tensor]]]]:
    """Batches in lists whose residuals are together as large as `hold_bytes`, or one batch."""
    batches, size, done = [], 0, 0
    for batch, by_layer in found:
        batches.append((batch, by_layer))
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


def points_of(saes: Mapping[int, SAE]) -> list[HookPoint]:
    """Where the SAEs read, in their order."""
    return [HookPoint.read_by(sae.hook_point, layer) for layer, sae in saes.items()]


def median_norms(model: nn.Module, points: Sequence[HookPoint], pieces: Pieces, batch_tokens: int) -> dict[str, float]:
    """Per layer the median norm of the residuals of a window."""
    norms: dict[int, list[Tensor]] = {point.layer: [] for point in points}
    for _, found in residuals(model, points, pieces.rows, batch_tokens):
        for layer, h in found.items():
            norms[layer].append(torch.linalg.vector_norm(h.float(), dim=-1).cpu())
    return {str(layer): float(torch.cat(some).median()) for layer, some in norms.items()}


def encode_window(
    model: nn.Module,
    saes: Mapping[int, SAE],
    pieces: Pieces,
    *,
    mask: TokenMask,
    medians: Mapping[int, float],
    batch_tokens: int,
    pool: Sequence[str],
    carried: Mapping[str, Any],
    report: Callable[[int], None],
    device: torch.device | str | None = None,
    hold_bytes: int = HOLD_BYTES,
) -> tuple[Window, dict[str, Any]]:
    """The window as tables, and the pooled residuals of a document that goes on in the next one.

    Args:
        mask: which tokens do not count.   medians: per layer the norm that sinks are measured by.
        report: called with the number of tokens that the model has read.
        device: where SAEs come for their turn, or None where they are.
        hold_bytes: about so many bytes of residuals wait for their SAEs, or one batch of them.
    """
    rows = pieces.rows
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.array([i for row in rows for i in row.ids], np.int64)
    document = np.repeat(np.array([row.document for row in rows], np.int32), lengths)
    position = np.arange(first[-1]) - np.repeat(first[:-1] - np.array([r.start for r in rows], np.int64), lengths)
    position = position.astype(np.int32)
    is_special = mask.special_at(torch.from_numpy(ids)).numpy()
    layers = {layer: LayerWindow(len(ids)) for layer in saes}
    pools = {layer: Pools(carried.get(str(layer))) for layer in saes} if pool else {}

    def encode(layer: int, sae: SAE, batches: list[tuple[list[int], dict[int, Tensor]]]) -> None:
        kept, tokens = [], []
        for batch, found in batches:
            h = found.pop(layer)
            here = np.concatenate([np.arange(first[i], first[i + 1]) for i in batch])
            sink = mask.sinks_at(h, medians.get(layer, math.inf)).cpu().numpy()
            layers[layer].sink[here] = sink
            keep = ~(sink | is_special[here])
            if keep.any():
                kept.append(h if keep.all() else h[torch.from_numpy(np.flatnonzero(keep)).to(h.device)])
                tokens.append(here[keep])
            if pool:
                pools[layer].add(batch, lengths, h, keep)
        if kept:
            acts = sae.encode(torch.cat(kept)).to("cpu")
            layers[layer].add(np.concatenate(tokens), acts.indices.numpy(), acts.values.float().numpy())

    made_of = held(residuals(model, points_of(saes), rows, batch_tokens), hold_bytes, report)
    with ahead(made_of, lambda: elsewhere(model, saes, device)) as waiting:
        for batches in waiting:
            for layer, sae in in_turn(saes, device):
                encode(layer, sae, batches)
                del sae
    masked = [masked_rows(layer, document, position, is_special, window.sink) for layer, window in layers.items()]
    tables = {
        "documents": document_table(pieces, first),
        "tokens": token_table(document, position, ids, [text for row in rows for text in row.texts]),
        "masked": pa.concat_tables(masked),
        "unreadable": pa.Table.from_pylist([asdict(bad) for bad in pieces.unreadable], schema=TABLES["unreadable"]),
        "residuals": TABLES["residuals"].empty_table(),
    }
    going_on = {}
    if pool:
        found_pools = [pools[layer].finish(layer, rows, pool) for layer in saes]
        tables["residuals"] = pa.concat_tables([table for table, _ in found_pools])
        going_on = {str(layer): rest for layer, (_, rest) in zip(saes, found_pools, strict=True) if rest is not None}
    made = {layer: window.rows(document, position, ~(is_special | window.sink)) for layer, window in layers.items()}
    return Window(made, tables), going_on


class LayerWindow:
    """The activations of one layer, collected batch by batch."""

    def __init__(self, tokens: int) -> None:
        self.sink = np.zeros(tokens, bool)
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, tokens: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
        """Active slots of some tokens: `(n,)`, `(n, k)`, `(n, k)`."""
        on = values > 0
        self.parts.append((np.repeat(tokens, on.sum(-1)), indices[on], values[on]))

    def rows(self, document: np.ndarray, position: np.ndarray, counted: np.ndarray) -> LayerRows:
        """Sorted by token and feature."""
        if self.parts:
            token, feature, value = (np.concatenate(column) for column in zip(*self.parts, strict=True))
        else:
            token, feature, value = np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32)
        order = np.argsort(token << 32 | feature, kind="stable")
        token, feature, value = token[order], feature[order].astype(np.int32), value[order].astype(np.float32)
        return LayerRows(document[token], position[token], feature, value, int(counted.sum()))


class Pools:
    """Pooled residuals of one layer: per row of tokens, then per document in order."""

    def __init__(self, carried: Mapping[str, Any] | None) -> None:
        self.found: dict[int, tuple[np.ndarray, int, np.ndarray | None]] = {}
        self.carried = copy.copy(carried)

    def add(self, batch: Sequence[int], lengths: np.ndarray, h: Tensor, keep: np.ndarray) -> None:
        """Sum, count and last of the counted residuals of each row of a batch."""
        kept = torch.from_numpy(keep).to(h.device)
        at = 0
        for i in batch:
            some = h[at : at + lengths[i]][kept[at : at + lengths[i]]]
            at += int(lengths[i])
            last = some[-1].float().cpu().numpy() if len(some) else None
            self.found[i] = some.float().cpu().double().sum(0).numpy(), len(some), last

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


def masked_rows(
    layer: int, document: np.ndarray, position: np.ndarray, special: np.ndarray, sink: np.ndarray
) -> pa.Table:
    """Rows of `masked` for one layer; a special token that is also a sink is special."""
    at = np.flatnonzero(special | sink)
    reason = np.where(special[at], "special", "sink")
    columns = [np.full(len(at), layer, np.int32), document[at], position[at]]
    arrays = [*(pa.array(column) for column in columns), pa.array(reason.tolist(), pa.string())]
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
