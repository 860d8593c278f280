"""`merge`: the stores of all shares of a corpus as one, with the rows that one run over the corpus would have."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.report import Progress

from .layout import MERGED, TABLES, Manifest
from .request import differences, place_of
from .store import FeatureStore
from .writer import LayerRows, StoreWriter, Window

# Activations of a window: what is in memory at once, several times over, and what a stop loses at most.
WINDOW = 2**21
SORTED = ("activations", "features", "stats")  # tables that a writer makes of the activations by layer
SAME_NORM = 1e-3  # thresholds measured on other machines differ in their last digits


def merge(
    folder: str | os.PathLike[str],
    shares: Sequence[str | os.PathLike[str]],
    progress: Progress | None = None,
    *,
    window: int = WINDOW,
) -> FeatureStore:
    """Write the stores of all shares of a corpus, in any order, as one store, and open it.

    Documents get the numbers they have in a run over the whole corpus, and the rows of every table are those of such a
    run. A merge that was stopped, in whatever way, is repeated with the same shares and goes on after its last window.
    The shares stay as they are.

    Args:
        folder: where the store goes.
        shares: the stores of `extract` on `Corpus(..., rank=i, world=n)`, one for each `i`.
        window: how many activations are in memory at once, or those of one document.

    Raises:
        InputError: a share is missing or there twice, a store is no share or one of another request, the folder has
            other content, or the disk is full.
        NotFoundError, FormatError: a share is not finished, or damaged.
    """
    with ExitStack() as stack:
        stores = in_order([stack.enter_context(FeatureStore(share)) for share in shares])
        first = stores[0].manifest
        infos = [replace(info, tokens=0, activations=0) for info in first.layers.values()]
        parts = Shares(stores)
        with StoreWriter(folder, first.model, whole_request(first), infos, sources_of(stores[0], folder)) as out:
            if out.state is not None and MERGED not in out.state:
                raise InputError(f"{folder} was begun by an extraction; name a new folder")
            done = 0 if out.state is None else int(out.state[MERGED])
            for until in () if out.finished else parts.windows(done, window):
                out.add(parts.window(done, until), {MERGED: until})
                done = until
                if progress is not None:
                    progress("merging", done / max(1, parts.documents), f"{done:,} documents")
            if not out.finished and not out.counts["tokens"]:
                raise InputError("the shares hold no document at all, so there is nothing to merge")
            if progress is not None and not out.finished:
                progress("indexing", 1.0, "")
            out.finish()
    return FeatureStore(folder)


def in_order(stores: Sequence[FeatureStore]) -> list[FeatureStore]:
    """The stores by the number of their share.

    Raises:
        InputError: one is no share, there twice, of another request than the others, or missing.
    """
    if not stores:
        raise InputError("name the stores of the shares to merge")
    by_number: dict[int, FeatureStore] = {}
    for store in stores:
        (number, of), (_, shares) = share_of(store), share_of(stores[0])
        if of != shares:
            raise InputError(
                f"{store.folder} is share {number}/{of} and {stores[0].folder} is one of {shares}; shares of one corpus"
                " are merged"
            )
        if number in by_number:
            raise InputError(
                f"share {number}/{of} is given twice, {by_number[number].folder} and {store.folder}; name each once"
            )
        by_number[number] = store
    of = share_of(stores[0])[1]
    if missing := [number for number in range(1, of + 1) if number not in by_number]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"of {of} shares {', '.join(f'{number}/{of}' for number in missing[:5])}{more} {_is(missing)} missing;"
            f" extract with --share {missing[0]}/{of} and name its store as well"
        )
    first = by_number[1]
    for number in range(2, of + 1):
        check_alike(first, by_number[number])
    return [by_number[number] for number in range(1, of + 1)]


def _is(some: Sequence[int]) -> str:
    return "is" if len(some) == 1 else "are"


def share_of(store: FeatureStore) -> tuple[int, int]:
    """Which share a store is of how many, counted from 1.

    Raises:
        InputError: it is none.
    """
    corpus = store.manifest.request.get("corpus")
    match corpus.get("share") if isinstance(corpus, dict) else None:
        case [int(number), int(of)] if 1 <= number <= of:
            return number, of
    raise InputError(f"{store.folder} is no share of a corpus; extract with --share, such as 3/16, writes those")


def whole_request(manifest: Manifest) -> dict[str, Any]:
    """The request of the corpus that a share is of."""
    request = copy.deepcopy(manifest.request)
    del request["corpus"]["share"]
    return request


def check_alike(first: FeatureStore, other: FeatureStore) -> None:
    """Refuse shares of different requests; thresholds that differ in their last digits are those of the first.

    Raises:
        InputError: it names every option that differs.
    """
    asked = []
    for manifest in (first.manifest, other.manifest):
        layers = [vars(replace(info, tokens=0, activations=0)) for info in manifest.layers.values()]
        asked.append({"model": manifest.model, "request": whole_request(manifest), "layers": layers})
    norms, others = (one["request"].get("counted", {}).get("norms", {}) for one in asked)
    if norms.keys() == others.keys() and all(_near(norms[point], others[point]) for point in norms):
        asked[1]["request"].get("counted", {})["norms"] = norms
    if said := "; ".join(differences(asked[0], asked[1])):
        raise InputError(
            f"{other.folder} is a share of another extraction than {first.folder} ({said}); extract all shares with the"
            " same options"
        )


def _near(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else abs(a - b) <= SAME_NORM * abs(a)


def sources_of(store: FeatureStore, folder: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """Where the model and the SAEs of a share lie, seen from another folder."""
    found: dict[str, dict[str, str]] = {}
    for what in ("model", "saes"):
        try:
            source = store.source(what)
        except NotFoundError:  # it has moved; whoever needs it says where
            found[what] = {"path": store.manifest.sources[what]["path"]}
            continue
        if source is not None:
            found[what] = place_of(source, folder)
    return found


class Shares:
    """All shares of a corpus, as windows of the whole.

    Attributes:
        documents: how many there are.
        where: per share the numbers of its documents in the whole corpus, ascending.
        first_token: of each document, and at the end how many tokens there are, `(documents + 1,)`.
    """

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        self.stores = stores
        sources = [name for name, _ in stores[0].manifest.request["corpus"]["sources"]]
        self.places = {name: i for i, name in enumerate(sources)}
        if len(self.places) < len(sources):
            raise InputError("two files of this corpus have one name, so the order of its documents is not known")
        share, place, row, tokens = [], [], [], []
        for i, store in enumerate(stores):
            table = store.tables["documents"]
            read = table.read(0, table.rows, ["source", "row", "tokens"])
            share.append(np.full(len(read), i, np.int32))
            place.append(self._place(read["source"]))
            row.append(read["row"].to_numpy())
            tokens.append(read["tokens"].to_numpy())
        order = np.lexsort((np.concatenate(row), np.concatenate(place)))
        lengths = np.concatenate(tokens)[order].astype(np.int64)
        self.documents, self.first_token = len(order), np.concatenate([[0], np.cumsum(lengths)])
        self.where = [np.flatnonzero(np.concatenate(share)[order] == i).astype(np.int32) for i in range(len(stores))]

    def _place(self, names: pa.ChunkedArray) -> np.ndarray:
        """The number of each document's source."""
        known = pa.array(list(self.places))
        return pc.index_in(names, known).to_numpy().astype(np.int64)  # pyright: ignore[reportAttributeAccessIssue]

    def windows(self, done: int, activations: int) -> Iterator[int]:
        """After which documents windows end, for windows of about so many activations."""
        total = sum(info.activations for store in self.stores for info in store.manifest.layers.values())
        limit = max(1, int(activations / max(1.0, total / max(1, int(self.first_token[-1])))))
        while not done or done < self.documents:
            end = int(np.searchsorted(self.first_token, self.first_token[done] + limit, side="right")) - 1
            done = min(self.documents, max(done + 1, end))
            yield done
            if done == self.documents:
                return

    def window(self, start: int, stop: int) -> Window:
        """The documents `start` to `stop` of the whole corpus; the first window also has what could not be read."""
        tables: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
        activations: dict[int, list[pa.Table]] = {layer: [] for layer in self.stores[0].layers}
        for i, store in enumerate(self.stores):
            low, high = (int(np.searchsorted(self.where[i], at)) for at in (start, stop))
            if low == high:
                continue
            numbers = self.where[i][low:high]
            documents = store.tables["documents"].read(low, high - low)
            first = documents["first_token"].to_numpy()
            tables["documents"].append(self._documents(documents, numbers))
            count = int(first[-1]) + int(documents["tokens"][-1].as_py()) - int(first[0])
            tables["tokens"].append(renumbered(store.tables["tokens"].read(int(first[0]), count), numbers, low))
            for name in ("spans", "masked", "residuals"):
                tables[name].append(renumbered(store.tables[name].between(low, high), numbers, low))
            for layer, found in activations.items():
                found.append(renumbered(store.tables["activations"].between(low, high, layer), numbers, low))
        if not start:
            unreadable = (store.tables["unreadable"] for store in self.stores)
            tables["unreadable"] = [table.read(0, table.rows) for table in unreadable]
        done = {name: together(name, found) for name, found in tables.items() if name not in SORTED}
        done["unreadable"] = self._by_corpus(done["unreadable"])
        counted = self._counted(done["masked"], done["tokens"].num_rows)
        return Window({layer: layer_rows(found, counted[layer]) for layer, found in activations.items()}, done)

    def _documents(self, documents: pa.Table, numbers: np.ndarray) -> pa.Table:
        columns = {name: documents[name] for name in documents.column_names}
        columns |= {"document": pa.array(numbers), "first_token": pa.array(self.first_token[numbers])}
        return pa.Table.from_arrays(list(columns.values()), schema=TABLES["documents"])

    def _by_corpus(self, unreadable: pa.Table) -> pa.Table:
        order = np.lexsort((unreadable["row"].to_numpy(), self._place(unreadable["source"])))
        return unreadable.take(pa.array(order))

    def _counted(self, masked: pa.Table, tokens: int) -> dict[int, int]:
        """Per layer how many of a window's tokens count."""
        layers = masked["layer"].to_numpy()
        return {layer: tokens - int((layers == layer).sum()) for layer in self.stores[0].layers}


def renumbered(table: pa.Table, numbers: np.ndarray, low: int) -> pa.Table:
    """Rows of a share with the documents' numbers in the whole corpus.

    Args:
        numbers: of the documents of the share from `low` on.
    """
    at = table.schema.get_field_index("document")
    return table.set_column(at, table.schema.field(at), pa.array(numbers[table["document"].to_numpy() - low]))


def together(name: str, found: Sequence[pa.Table]) -> pa.Table:
    """Rows of several shares in the order of the table; those of one document keep theirs."""
    table = pa.concat_tables([TABLES[name].empty_table(), *found])
    if name == "unreadable":
        return table
    keys = [table["document"].to_numpy()]
    if "layer" in table.column_names:
        keys.append(table["layer"].to_numpy())
    return table.take(pa.array(np.lexsort(keys))).combine_chunks()


def layer_rows(found: Sequence[pa.Table], tokens: int) -> LayerRows:
    """The activations of one layer."""
    table = together("activations", found)
    document, position, feature, value = (
        table[name].to_numpy() for name in ("document", "position", "feature", "value")
    )
    return LayerRows(document, position, feature, value, tokens)
