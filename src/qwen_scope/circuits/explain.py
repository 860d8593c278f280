"""`explain`: from a prompt to the graph of what leads to a quantity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.features import promoted_tokens
from qwen_scope.report import Progress
from qwen_scope.stats import coefficient

from .edges import Incoming, incoming
from .effects import Effects, Place, ablated, effects
from .graph import Edge, Graph, LayerShares, Node, Received, find_ladders
from .jointly import jointly
from .options import WhyOptions, check_method
from .reading import Reading
from .scores import tracer_scores
from .tail import moved, tail

PROMOTED = 3
CHOOSING = 5
"""Points of the way from no feature to all at which features are weighed that are to be chosen."""


def explain(
    reading: Reading,
    options: WhyOptions | None = None,
    *,
    labels: Callable[[int, int], str] | None = None,
    progress: Progress | None = None,
) -> Graph:
    """The graph of a prompt that was read.

    Which features carry the quantity together and what one of them does alone are two questions, so features are
    chosen by what they add while those of all layers grow together (`jointly`), with a share per layer and a budget
    over all, and their effects are told by the method. Edges into each are computed from every active feature and every
    error of the layer below, and kept by their share of what the receiver takes in. Errors and embeddings are nodes
    where they send an edge that is kept.

    Args:
        labels: what a feature is called, by layer and index; "" where it has no name.

    Raises:
        InputError: a method that does not fit the model, or a prompt in which no feature can be a node.
    """
    options = options or WhyOptions()
    check_nodes(reading)
    method, tell = check_method(options.method), progress or (lambda *_: None)
    tell("effects", 0.0, method)
    found = effects(reading, method, steps=options.steps, most=2 * options.nodes, progress=progress)
    short, start = tail(reading)
    shares = found.features if method == "joint" else jointly(short, CHOOSING, progress)[0]
    chosen = choose(reading, found, shares, options)
    places = [one.place for one in chosen]
    exact = [found.exact.get(place) for place in places]
    if method == "exact":
        checked = [n for n, value in enumerate(exact) if value is None]
    else:
        checked = sorted(range(len(chosen)), key=lambda n: -abs(chosen[n].effect))[: options.exact]
    measured = ablated(short, [[moved(places[n], start)] for n in checked], progress=progress).tolist()
    agreement = None if method == "exact" else agree([chosen[n].effect for n in checked], measured)
    for n, value in zip(checked, measured, strict=True):
        exact[n] = value
    if method == "exact":
        chosen = [replace(one, effect=value or 0.0) for one, value in zip(chosen, exact, strict=True)]
    del short  # with the keys and values that it keeps
    edges = incoming(reading, places, method, progress=progress)
    tell("graph", 0.0, "")
    return _Assembly(reading, found, chosen, exact, edges, options, labels or (lambda *_: "")).graph(agreement)


def check_nodes(reading: Reading) -> None:
    """Refuse a prompt without a single feature to explain anything with, such as one of the first token alone.

    Raises:
        InputError: it is one; why its tokens have no features as nodes is said.
    """
    if reading.n_nodes:
        return
    reasons = dict.fromkeys(reason for said in reading.left_out.values() for reason in said if reason)
    why = f" ({', '.join(reasons)})" if reasons else ""
    raise InputError(
        f"no feature of this prompt can be a node: no token counts for the SAEs{why}; give a longer prompt, or other"
        " positions"
    )


def brief_name(source: str) -> str:
    """A model's name: of a folder the last two parts, so that pages that are passed on tell nothing of a machine."""
    return "/".join(Path(source).parts[-2:]) if Path(source).is_absolute() else source


def agree(estimated: Sequence[float], measured: Sequence[float]) -> tuple[float, float] | None:
    """Pearson and Spearman correlation; None for fewer than four pairs, or where one side does not vary."""
    one, other = np.asarray(estimated, float), np.asarray(measured, float)
    if len(one) < 4 or not np.ptp(one) or not np.ptp(other):
        return None
    return coefficient(one, other, "pearson"), coefficient(one, other, "spearman")


@dataclass(frozen=True)
class Chosen:
    """A feature that becomes a node: its place, its entry in `reading.active`, activation, effect and share."""

    place: Place
    entry: int
    activation: float
    effect: float
    share: float


def choose(
    reading: Reading, found: Effects, shares: Mapping[int, Float[Tensor, " n"]], options: WhyOptions
) -> list[Chosen]:
    """The features with the largest shares, by layer and position; a layer without any by its effects."""
    pool: list[tuple[float, Chosen]] = []
    for layer in reading.layers:
        one, effect, share = reading.active[layer], found.features[layer], shares[layer]
        size = (share if bool(share.any()) else effect).abs()
        order = size.argsort(descending=True, stable=True)
        carried = size[order].cumsum(0)
        enough = int((carried < options.node_share * carried[-1]).sum()) + 1 if len(order) else 0
        for n in order[: min(enough, options.nodes)].tolist():
            if float(size[n]) > 0:
                place = Place(layer, int(one.positions[n]), int(one.features[n]))
                node = Chosen(place, n, float(one.values[n]), float(effect[n]), float(share[n]))
                pool.append((float(size[n]), node))
    pool.sort(key=lambda one: -one[0])
    chosen = [node for _, node in pool[: options.nodes]]
    return sorted(chosen, key=lambda one: (one.place.layer, one.place.position, one.entry))


Key = tuple[str, int | None, int, int]
"""What a node is before it has a number: kind, layer, position, and its entry among the active features."""


@dataclass(frozen=True)
class _Candidate:
    source: Key
    edge: Edge
    matters: float


class _Assembly:
    """Nodes and edges of a graph from what was computed."""

    def __init__(
        self,
        reading: Reading,
        found: Effects,
        chosen: Sequence[Chosen],
        exact: Sequence[float | None],
        edges: Sequence[Incoming],
        options: WhyOptions,
        labels: Callable[[int, int], str],
    ) -> None:
        self.reading, self.found, self.chosen, self.exact = reading, found, chosen, exact
        self.edges, self.options, self.labels = edges, options, labels
        self.entries: dict[int, Tensor] = {}
        for layer in reading.layers:
            here = [one.entry for one in chosen if one.place.layer == layer]
            self.entries[layer] = torch.tensor(here, dtype=torch.long)

    def graph(self, agreement: tuple[float, float] | None) -> Graph:
        reading, scope = self.reading, self.reading.scope
        scores = tracer_scores(reading, [one.place for one in self.chosen], self.edges)
        candidates, received = self.candidates()
        candidates.sort(key=lambda one: -one.matters)
        kept = candidates[: self.options.edges]
        nodes, index = self.nodes({one.source for one in kept})
        receivers = [index["feature", one.place.layer, one.place.position, one.entry] for one in self.chosen]
        receivers.append(len(nodes) - 1)
        edges = [replace(one.edge, source=index[one.source], target=receivers[one.edge.target]) for one in kept]
        edges.sort(key=lambda one: (one.source, one.target))
        probability = None
        if reading.logits is not None:
            spread = torch.softmax(reading.logits.float(), -1)
            probability = float(spread[list(reading.quantity.tokens)].sum())
        return Graph(
            model=brief_name(scope.name),
            group=scope.saes[reading.layers[0]].identity.group,
            prompt=str(scope.tokenizer.decode(list(reading.ids))),
            tokens=reading.tokens,
            ids=reading.ids,
            quantity=reading.quantity.name(scope.tokenizer),
            value=reading.value,
            answer=reading.quantity.tokens,
            probability=probability,
            method=self.found.method,
            layers=reading.layers,
            n_layers=scope.n_layers,
            nodes=tuple(nodes),
            edges=tuple(edges),
            ladders=find_ladders(nodes, edges),
            received={receivers[n]: one for n, one in enumerate(received)},
            shares={layer: self.layer_shares(layer) for layer in reading.layers},
            edges_left_out=self.possible - len(kept),
            replacement=scores.replacement,
            completeness=scores.completeness,
            agreement=agreement,
        )

    def candidates(self) -> tuple[list[_Candidate], list[Received]]:
        """The edges whose share suffices, and where everything that each receiver takes in comes from."""
        found: list[_Candidate] = []
        received = []
        self.possible = 0
        effect_of = [*(one.effect for one in self.chosen), self.reading.value]
        for n, one in enumerate(self.edges):
            total = float(one.features.abs().sum() + one.errors.abs().sum())
            rows: list[tuple[Key, float, float]] = []
            if one.layer is not None:
                entries, active = self.entries[one.layer], self.reading.active[one.layer]
                passed = one.features_passed
                rows += [
                    (("feature", one.layer, int(active.positions[i]), i), float(one.features[i]),
                     float(passed[i]))
                    for i in entries.tolist()
                ]  # fmt: skip
            kind = "embedding" if one.layer is None else "error"
            pairs = zip(one.errors.tolist(), one.errors_passed.tolist(), strict=True)
            others = [((kind, one.layer, p, p), weight, passed) for p, (weight, passed) in enumerate(pairs)]
            taken = 0.0
            self.possible += len(rows) + sum(weight != 0 for _, weight, _ in others)
            for source, weight, passed in [*rows, *others]:
                share = abs(weight) / total if total else 0.0
                if weight and share >= self.options.edge_share:
                    found.append(_Candidate(source, Edge(-1, n, weight, passed, share), share * abs(effect_of[n])))
                    taken += share if source[0] == "feature" else 0.0
            sent = float(one.errors.abs().sum()) / total if total else 0.0
            by_features = 1.0 - sent if total else 0.0
            errors, embeddings = (sent, 0.0) if one.layer is not None else (0.0, sent)
            received.append(Received(taken, by_features - taken, errors, embeddings))
        return found, received

    def nodes(self, sources: set[Key]) -> tuple[list[Node], dict[Key, int]]:
        """All nodes in the order of layers, and where each is."""
        reading, found = self.reading, self.found
        made: list[tuple[Key, Node]] = []
        for kind, layer, position, entry in sources:
            if kind == "embedding":
                node = Node("embedding", position, effect=_plain(found.embeddings[position]))
                made.append(((kind, layer, position, entry), node))
            elif kind == "error":
                assert layer is not None, "of a layer"
                node = Node("error", position, layer, effect=float(found.errors[layer][position]))
                made.append(((kind, layer, position, entry), node))
        promotes = self.promoted()
        for one, exact in zip(self.chosen, self.exact, strict=True):
            place = one.place
            assert place.feature is not None, "of a feature"
            node = Node(
                "feature", place.position, place.layer, place.feature, one.activation, one.effect, one.share, exact,
                self.fires(place.layer, place.feature), promotes[place.layer, place.feature],
                self.labels(place.layer, place.feature),
            )  # fmt: skip
            made.append((("feature", place.layer, place.position, one.entry), node))
        made.sort(key=lambda pair: (-1 if pair[1].layer is None else pair[1].layer, pair[1].kind != "error", pair[0]))
        index = {key: n for n, (key, _) in enumerate(made)}
        target = Node("target", reading.quantity.position, effect=reading.value)
        return [*(node for _, node in made), target], index

    def fires(self, layer: int, feature: int) -> tuple[tuple[int, float], ...]:
        """Where in the prompt a feature is active, and how much."""
        one = self.reading.active[layer]
        where = (one.features == feature).nonzero()[:, 0]
        return tuple(zip(one.positions[where].tolist(), one.values[where].tolist(), strict=True))

    def promoted(self) -> dict[tuple[int, int], tuple[str, ...]]:
        """By layer and feature, the tokens that the features of the graph promote directly."""
        out = {}
        for layer in self.reading.layers:
            features = sorted({one.place.feature or 0 for one in self.chosen if one.place.layer == layer})
            shown = promoted_tokens(self.reading.scope, layer, features, PROMOTED) if features else []
            out.update({(layer, feature): tokens for feature, tokens in zip(features, shown, strict=True)})
        return out

    def layer_shares(self, layer: int) -> LayerShares:
        features, errors = self.found.features[layer].abs(), float(self.found.errors[layer].abs().sum())
        total = float(features.sum()) + errors
        kept = float(features[self.entries[layer].to(features.device)].sum())
        n = len(self.entries[layer])
        if not total:
            return LayerShares(0.0, 0.0, 0.0, n, len(features) - n)
        left_out = (float(features.sum()) - kept) / total
        return LayerShares(kept / total, left_out, errors / total, n, len(features) - n)


def _plain(value: Tensor) -> float:
    """An effect, 0 where the method gives none."""
    return 0.0 if bool(value.isnan()) else float(value)
