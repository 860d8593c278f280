"""`FeatureStore`: a finished store, opened strictly and asked questions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int64

from qwen_scope.errors import FormatError, MismatchError, NotFoundError, check_count
from qwen_scope.files import Remote, digest_of, place
from qwen_scope.report import HasFrames, Table
from qwen_scope.sae import SAE, Identity

from . import contexts, sql
from .contexts import Context, FeatureSummary, Histogram
from .documents import Condition, meeting
from .layout import LayerInfo
from .opening import Places, open_tables, read_manifest
from .push import push_store
from .queries import connect, read_bounded, refusals, select
from .request import source_of
from .spans import Spans, check_phases

MEMORY = "1500MB"


@final
class FeatureStore(HasFrames):
    """A finished store. Opening it reads the manifest and the end of every part, not the activations.

    Attributes:
        folder: where it is.
        manifest: what it holds.

    Methods about one feature read the few row groups that hold it; `sql` and the methods about many features stream
    through DuckDB. Not to be shared between threads: open the folder once per thread.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        saes: Mapping[int, SAE | Identity] | None = None,
        *,
        memory: str = MEMORY,
    ) -> None:
        """Open a store, in a folder or at a URI such as `s3://bucket/store`, from where nothing is copied.

        Args:
            saes: the SAEs the questions will be about, by layer; a store made with others is refused.
            memory: how much DuckDB may take before it goes to disk.

        Raises:
            NotFoundError: there is no store, or its URI does not answer.
            FormatError: it is damaged, or not what the format says.
            MismatchError: it was made with another SAE.
        """
        self.folder: Path | Remote = place(folder)
        self.manifest = read_manifest(self.folder)
        self.tables = open_tables(self.folder, self.manifest)
        self._places = Places(self.folder, self.manifest, self.tables)
        for layer, sae in (saes or {}).items():
            self.require(layer, sae)
        self._memory, self._connection = memory, None
        self._spans: Spans | None = None

    def __repr__(self) -> str:
        m = self.manifest
        return f"FeatureStore({str(self.folder)!r}: {m.documents} documents, {m.tokens} tokens, layers {self.layers})"

    def sheet(self) -> Table:
        """A row per layer: its SAE, tokens that count, and activations."""
        names = ("layer", "group", "d_sae", "tokens", "activations")
        rows = [[getattr(self.layer(one), name, one) for name in names] for one in self.layers]
        return Table(repr(self), names, rows)

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the query engine and the files."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        for table in self.tables.values():
            table.close()

    @property
    def layers(self) -> list[int]:
        return sorted(self.manifest.layers)

    def layer(self, layer: int) -> LayerInfo:
        """What is known of one layer.

        Raises:
            NotFoundError: the store has no such layer.
        """
        if layer not in self.manifest.layers:
            raise NotFoundError(f"{self.folder} has no layer {layer}; it has layers {', '.join(map(str, self.layers))}")
        return self.manifest.layers[layer]

    def require(self, layer: int, sae: SAE | Identity) -> None:
        """Refuse to answer about another SAE than the one the store was made with.

        An SAE whose files name no layer may stand for any, as in `extract`: its weights decide.

        Raises:
            MismatchError: it is another one.   NotFoundError: the store has no such layer.
        """
        info, asked = self.layer(layer), sae if isinstance(sae, Identity) else sae.identity
        if asked.layer not in (None, layer) or asked.fingerprint != info.fingerprint:
            made = Identity(info.group, info.layer, info.fingerprint)
            raise MismatchError(f"{self.folder} was made with the SAE {made} and can't answer about {asked}")

    def source(self, what: Literal["model", "saes"]) -> str | None:
        """The name or the folder of the model or the SAEs it was made with; None where an earlier writer kept it not.

        Raises:
            NotFoundError: the folder has moved.
        """
        return source_of(self.manifest, self.folder, what)

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Send it, with its labels and notes, to a dataset repository of the Hub, with a card; the commit's address.

        Raises:
            InputError: a store at a URI, no right to write there, or no token.
        """
        return push_store(self.folder, self.manifest, repo, private)

    def verify(self) -> None:
        """Read every part once and compare it with its checksum in the manifest.

        Raises:
            FormatError: a part has changed.
        """
        for part in self.manifest.parts:
            if digest_of(self.folder / part.file) != part.sha256:
                raise FormatError(f"{part.file} in {self.folder} has changed since it was written")

    # --- many features at once -------------------------------------------------------------------------------------

    @property
    def connection(self) -> Any:
        """DuckDB with one view per table of the store, confined to its folder; nothing is copied into it."""
        if self._connection is None:
            self._connection = connect(self.folder, self.tables, self._memory)
        return self._connection

    def sql(self, query: str, params: Mapping[str, Any] | Sequence[Any] | None = None) -> pa.Table:
        """The answer of DuckDB to one SELECT over the tables of the store, which `docs/store-format.md` describes.

        Args:
            params: values for `$name` (a mapping) or `?` (a sequence) in the query.

        Raises:
            InputError: the query is something else, or DuckDB refuses it.
        """
        with refusals():
            return self.stream(query, params).read_all()

    def answer(self, query: str) -> pa.Table:
        """As `sql`, for a query of somebody else: with an end after ten minutes or 100 MB.

        Raises:
            InputError: as `sql`, or it takes or gives more.
        """
        return read_bounded(self.connection, query)

    def stream(
        self, query: str, params: Mapping[str, Any] | Sequence[Any] | None = None, batch: int = 2**16
    ) -> pa.RecordBatchReader:
        """As `sql`, `batch` rows at a time: for answers larger than memory."""
        return select(self.connection, query, params, batch)

    def firing(
        self,
        reduction: Literal["any", "last", "mean", "max"] = "max",
        layers: Sequence[int] | None = None,
        *,
        features: Sequence[int] | None = None,
        documents: Sequence[int] | None = None,
        phases: Sequence[str] | None = None,
    ) -> pa.Table:
        """The `Firing` table: document, layer, feature, value and position of that value, by document, layer, feature.

        A row is there where the value is not 0. Masked tokens do not count.

        Args:
            reduction: `any` is 1 where the feature fires at all, at its first position; `max` the largest activation,
                at the first position that has it; `last` the activation on the last token; `mean` the mean over all
                tokens of the document, with no position (-1).
            layers, features, documents: only these.
            phases: of each document only the tokens of these phases of a conversation; `last` is then the last of them.

        Raises:
            InputError: an unknown reduction or phase.
            NotFoundError: a layer or feature that does not exist, or phases of a store that tells none.
        """
        return self.firing_stream(reduction, layers, features=features, documents=documents, phases=phases).read_all()

    def firing_stream(
        self,
        reduction: Literal["any", "last", "mean", "max"] = "max",
        layers: Sequence[int] | None = None,
        *,
        features: Sequence[int] | None = None,
        documents: Sequence[int] | None = None,
        phases: Sequence[str] | None = None,
    ) -> pa.RecordBatchReader:
        """As `firing`, in batches: for tables larger than memory."""
        chosen = [self.layer(layer).layer for layer in (self.layers if layers is None else layers)]
        for feature in features or ():
            if not any(0 <= feature < self.layer(layer).d_sae for layer in chosen):
                raise NotFoundError(f"no layer of {chosen} has a feature {feature}")
        named = None if phases is None else self.check_phases(phases)
        return self.stream(*sql.firing_query(reduction, chosen, features, documents, named))

    def cofiring(self, layer: int, feature: int, n: int | None = 20, *, other_layer: int | None = None) -> pa.Table:
        """Features that fire on the same tokens as this one: feature, both, tokens, jaccard; highest Jaccard first.

        Args:
            n: how many, or None for all.
            other_layer: look for them in this layer instead of the feature's own.
        """
        self.check_feature(layer, feature)
        other = self.layer(layer if other_layer is None else other_layer).layer
        return self.sql(*sql.cofiring_query(layer, feature, other, n))

    def document_features(self, document: int, layer: int, n: int | None = None) -> pa.Table:
        """Features of one document: feature, maximum, position of the maximum, tokens, sum; largest maximum first."""
        self.check_document(document)
        return self.sql(*sql.document_query(document, self.layer(layer).layer, n))

    def documents_of(self, layer: int, feature: int, n: int | None = None) -> pa.Table:
        """Documents where a feature fires: document, maximum, tokens; largest maximum first."""
        self.check_feature(layer, feature)
        return self.sql(*sql.documents_query(layer, feature, n))

    def stats(self, layer: int) -> pa.Table:
        """Per feature of a layer: feature, tokens, documents, sum, maximum, minimum, first_row, frequency and mean.

        `frequency` is the share of counted tokens on which it fires, `mean` its mean activation over counted tokens.
        """
        counted = max(1, self.layer(layer).tokens)
        table = self.tables["stats"].read(self._places.start(layer), self.layer(layer).d_sae).drop_columns(["layer"])
        frequency = table["tokens"].to_numpy() / counted
        mean = table["sum"].to_numpy() / counted
        return table.append_column("frequency", pa.array(frequency)).append_column("mean", pa.array(mean))

    def left_out(self) -> dict[int, dict[str, int]]:
        """Per layer how many tokens do not count, by reason; layers and reasons without one are not named."""
        query = "SELECT layer, reason, count(*) AS tokens FROM masked GROUP BY ALL ORDER BY layer, tokens DESC, reason"
        out: dict[int, dict[str, int]] = {}
        for row in self.sql(query).to_pylist():
            out.setdefault(row["layer"], {})[row["reason"]] = row["tokens"]
        return out

    def residuals(
        self, layer: int, pooling: Literal["mean", "last"] = "mean"
    ) -> Float32[np.ndarray, "documents d_model"]:
        """The pooled residual of every document at a layer; a row of NaN where all its tokens are masked.

        Raises:
            NotFoundError: the store was made without them.
        """
        self.layer(layer)
        table = self.sql(
            "SELECT document, vector FROM residuals WHERE layer = ? AND pooling = ? ORDER BY document", [layer, pooling]
        )
        if not len(table):
            raise NotFoundError(
                f"{self.folder} holds no residuals pooled by {pooling!r}; extract with --pool {pooling}"
            )
        vectors = np.stack(table["vector"].to_numpy())
        out = np.full((self.manifest.documents, vectors.shape[1]), np.nan, np.float32)
        out[table["document"].to_numpy()] = vectors
        return out

    def where(self, *conditions: Condition) -> Int64[np.ndarray, " documents"]:
        """The documents whose metadata meet every condition, ascending.

        Args:
            conditions: `(column, value, equal)`: the column is the value or, where `equal` is False, is not (a missing
                column is not). Numbers and truth values are compared as they are written in JSON.

        Raises:
            NotFoundError: no document has such a column.
        """
        metas = self.sql("SELECT meta FROM documents ORDER BY document")["meta"].to_pylist()
        return meeting([json.loads(text) for text in metas], conditions, self.folder)

    # --- one feature -------------------------------------------------------------------------------------------------

    def check_feature(self, layer: int, feature: int) -> None:
        """Raise NotFoundError unless the layer has such a feature."""
        width = self.layer(layer).d_sae
        if isinstance(feature, bool) or not 0 <= feature < width:
            raise NotFoundError(f"layer {layer} has features 0 to {width - 1}, not {feature}")

    def check_document(self, document: int) -> None:
        """Raise NotFoundError unless there is such a document."""
        if not 0 <= document < self.manifest.documents:
            raise NotFoundError(f"{self.folder} has documents 0 to {self.manifest.documents - 1}, not {document}")

    def feature(self, layer: int, feature: int) -> FeatureSummary:
        """How often and how strongly one feature fires."""
        self.check_feature(layer, feature)
        row = self._places.row(layer, feature)
        return contexts.summary(row, self.layer(layer).tokens, self.manifest.documents)

    def values(self, layer: int, feature: int) -> Float32[np.ndarray, " rows"]:
        """Every activation of a feature, largest first."""
        return self.tables["features"].read(*self._rows(layer, feature), ["value"])["value"].to_numpy()

    def quantiles(self, layer: int, feature: int, shares: Sequence[float]) -> Float64[np.ndarray, " shares"]:
        """Per share the smallest activation that at least this share of the firing tokens do not exceed."""
        return contexts.quantiles(self.tables["features"], *self._rows(layer, feature), shares)

    def histogram(self, layer: int, feature: int, bins: int | Sequence[float] = 20) -> Histogram:
        """How many firing tokens have which activation: `bins` equal steps from 0 to the maximum, or given edges."""
        return contexts.histogram(self.tables["features"], *self._rows(layer, feature), bins)

    def contexts(
        self,
        layer: int,
        feature: int,
        n: int = 20,
        *,
        how: Literal["top", "random", "quantiles"] = "top",
        before: int = 20,
        after: int = 10,
        strata: int = 5,
        seed: int = 0,
        per_document: bool = False,
        phases: Sequence[str] | None = None,
    ) -> list[Context]:
        """Places where a feature fires, with the tokens around them.

        Args:
            n: how many; fewer where the feature fires less often.
            how: the `top` activations, a `random` sample of all, or `quantiles`: the activations in `strata` equal
                shares by size, from each an equal random sample, strongest first.
            before, after: tokens of the same document to show around the place.
            per_document: of the top activations only the strongest of each document.
            phases: only places in these phases of a conversation.

        Raises:
            InputError: an unknown phase, or `n` below 1.   NotFoundError: phases of a store that tells none.
        """
        start, rows = self._rows(layer, feature)
        check_count("n", n)
        some = None
        if phases is not None:
            named = self.check_phases(phases)
            some = contexts.within(self.tables["features"], start, rows, self.spans, named)
        if per_document and how == "top":
            chosen = contexts.first_per_document(self.tables["features"], start, rows, n, some)
        else:
            chosen = contexts.choose(rows if some is None else len(some), n, how, strata, seed)
            chosen = chosen if some is None else some[chosen]
        return contexts.read(self.tables, self.spans, layer, feature, start, rows, chosen, before, after)

    def silent(
        self, layer: int, feature: int, n: int = 20, *, before: int = 20, after: int = 10, seed: int = 0
    ) -> list[Context]:
        """Random places without the feature, nor in the tokens shown around them; fewer than `n` where it fires nearly
        everywhere."""
        return contexts.silent(self.tables, layer, feature, *self._rows(layer, feature), n, before, after, seed)

    def phase_counts(self, layer: int, feature: int) -> dict[str, int]:
        """On how many tokens of which phase a feature fires; empty where the store tells no phases."""
        start, rows = self._rows(layer, feature)
        return contexts.phase_counts(self.tables["features"], start, rows, self.spans)

    def check_phases(self, phases: Sequence[str]) -> list[str]:
        """The phases in order; InputError for none or an unknown one, NotFoundError where the store tells none."""
        return check_phases(self.tables["spans"], phases, self.folder)

    @property
    def spans(self) -> Spans:
        """Which phase the tokens are of; read on first use."""
        if self._spans is None:
            self._spans = Spans(self.tables["spans"])
        return self._spans

    def _rows(self, layer: int, feature: int) -> tuple[int, int]:
        """The first row of a feature in the `features` table, and how many rows it has."""
        self.check_feature(layer, feature)
        return self._places.rows(layer, feature)
