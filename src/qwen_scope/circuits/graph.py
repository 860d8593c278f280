"""`Graph`: the features, errors, embeddings and edges that lead to a quantity, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from qwen_scope.report import HasFrames, Table, visible

Kind = Literal["embedding", "feature", "error", "target"]


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        kind: what it is.
        position: of its token.
        layer, feature: of a feature; an error has a layer alone.
        activation: of a feature; None for other kinds.
        effect: on the quantity as the method estimates it; of the target, its value.
        share: what a feature adds while those of all layers grow together, by which features were chosen.
        exact: what ablation says, where it was asked for.
        fires: where in the prompt a feature is active, as position and activation.
        promotes: the tokens that a feature's direction promotes directly, strongest first.
        label: its name, where one is known.
    """

    kind: Kind
    position: int
    layer: int | None = None
    feature: int | None = None
    activation: float | None = None
    effect: float = 0.0
    share: float | None = None
    exact: float | None = None
    fires: tuple[tuple[int, float], ...] = ()
    promotes: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """Such as `3/17`, `error 3`, `embedding` or `target`."""
        if self.kind == "feature":
            return f"{self.layer}/{self.feature}"
        return f"error {self.layer}" if self.kind == "error" else self.kind


@dataclass(frozen=True)
class Edge:
    """What one node writes into the next layer's.

    Attributes:
        source, target: indices of nodes.
        weight: what the receiver's pre-activation (or the quantity) gets from the sender.
        passed: the part of it that the stream carries unchanged; the rest the blocks between compute.
        share: of the size of all that the receiver takes in.
    """

    source: int
    target: int
    weight: float
    passed: float
    share: float


@dataclass(frozen=True)
class Received:
    """Where what a receiver takes in comes from, as shares of its size; they add up to 1."""

    kept: float
    features: float
    errors: float
    embeddings: float


@dataclass(frozen=True)
class LayerShares:
    """What of a layer's effects is in the graph, as shares of the size of all of them; they add up to 1.

    Attributes:
        kept: of the features that are nodes.   left_out: of the other active features.   errors: of the errors.
        n_kept, n_left_out: how many features.
    """

    kept: float
    left_out: float
    errors: float
    n_kept: int
    n_left_out: int


@dataclass(frozen=True)
class Ladder:
    """A feature that passes through layers, as the nodes of it, lowest layer first.

    Attributes:
        nodes: indices.
        written: the layer whose block (or those since the layer taken apart before) wrote it; None: the embedding did.
    """

    nodes: tuple[int, ...]
    written: int | None


@dataclass(frozen=True)
class Path:
    """A way through the graph to the target.

    Attributes:
        nodes: the first node of each ladder on it, the target last.
        weight: what its last ladder writes into the quantity.
        shares: of each step, how much of what its receiver takes in comes from there.
    """

    nodes: tuple[int, ...]
    weight: float
    shares: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Graph(HasFrames):
    """Why a model says what it says at one position of one prompt.

    Attributes:
        model, group: names of the model and of its SAEs.
        prompt, tokens, ids: up to the position.
        quantity: what is explained, in words.
        value: of it.
        answer: the tokens that are asked about; none for a feature.
        probability: that one of them is the next; None for a feature.
        method: of the effects.
        layers: those that were taken apart.
        n_layers: of the model.
        nodes, edges: in the order of layers, the target last; edges lead from lower to higher layers.
        ladders: every feature is in exactly one.
        received: by node, for features and the target.
        shares: by layer.
        edges_left_out: edges between nodes that were dropped.
        replacement, completeness: scores of the graph as circuit-tracer defines them (see `tracer_scores`).
        agreement: Pearson and Spearman correlation of estimated and exact effects, where ablation was asked for.
    """

    model: str
    group: str
    prompt: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    quantity: str
    value: float
    answer: tuple[int, ...]
    probability: float | None
    method: str
    layers: tuple[int, ...]
    n_layers: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    ladders: tuple[Ladder, ...]
    received: Mapping[int, Received]
    shares: Mapping[int, LayerShares]
    edges_left_out: int
    replacement: float
    completeness: float
    agreement: tuple[float, float] | None = None

    @property
    def target(self) -> int:
        """The index of the target."""
        return len(self.nodes) - 1

    @property
    def features(self) -> list[int]:
        """The indices of features, the largest effect first."""
        found = [i for i, node in enumerate(self.nodes) if node.kind == "feature"]
        return sorted(found, key=lambda i: -abs(self.nodes[i].effect))

    @cached_property
    def ladder_of(self) -> dict[int, Ladder]:
        """By feature."""
        return {i: ladder for ladder in self.ladders for i in ladder.nodes}

    def written_by(self, ladder: Ladder) -> str:
        """What wrote a ladder, in words: `block 3`, `blocks 4 to 6` where layers between were not taken apart."""
        if ladder.written is None:
            return "the token"
        first = max((layer for layer in self.layers if layer < ladder.written), default=-1) + 1
        return f"block {first}" if first == ladder.written else f"blocks {first} to {ladder.written}"

    def paths(self, n: int = 10) -> list[Path]:
        """How the `n` features (or embeddings) that write most into the quantity come about, each as one way to it.

        From the quantity backwards every step takes the sender, other than an error, with the largest share of what the
        step's ladder takes in; a ladder is one step, wherever it is entered and left.
        """
        inward: dict[int, list[Edge]] = {}
        for edge in self.edges:
            if self.nodes[edge.source].kind != "error":
                inward.setdefault(edge.target, []).append(edge)
        heads = self._senders((self.target,), inward)
        ranked = sorted(heads.items(), key=lambda one: -abs(one[1][0]))
        return [self._back(first, weight, inward) for first, (weight, _) in ranked[:n]]

    def _back(self, first: int, weight: float, inward: Mapping[int, Sequence[Edge]]) -> Path:
        way, shares = [self.target], [self._senders((self.target,), inward)[first][1]]
        here: int | None = first
        while here is not None:
            way.append(here)
            within = self.ladder_of[here].nodes if here in self.ladder_of else (here,)
            # two ladders that span the same layers can each send to the other
            senders = {one: sent for one, sent in self._senders(within, inward).items() if one not in way}
            here = max(senders, key=lambda one: senders[one][1], default=None)
            if here is not None:
                shares.append(senders[here][1])
        return Path(tuple(reversed(way)), weight, tuple(reversed(shares)))

    def _senders(self, within: Sequence[int], inward: Mapping[int, Sequence[Edge]]) -> dict[int, tuple[float, float]]:
        """By the first node of each other ladder (or embedding) that sends to some nodes: weight, and largest share."""
        found: dict[int, tuple[float, float]] = {}
        for j in within:
            for edge in inward.get(j, []):
                if edge.source not in within:
                    first = self.ladder_of[edge.source].nodes[0] if edge.source in self.ladder_of else edge.source
                    weight, share = found.get(first, (0.0, 0.0))
                    found[first] = weight + edge.weight, max(share, edge.share)
        return found

    def sheet(self) -> Table:
        """A row per feature, the largest effect first."""
        columns = (
            "layer",
            "feature",
            "position",
            "token",
            "activation",
            "effect",
            "ablated",
            "written by",
            "label or promotes",
        )
        rows = []
        for i in self.features:
            node = self.nodes[i]
            said = node.label or " ".join(visible(token) for token in node.promotes)
            here = (node.layer, node.feature, node.position, self.tokens[node.position], node.activation, node.effect)
            rows.append((*here, node.exact, self.written_by(self.ladder_of[i]), said))
        return Table(f"{self.quantity} after {self.tokens[-1]!r}: {self.value:.4g}", columns, rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def find_ladders(nodes: Sequence[Node], edges: Sequence[Edge]) -> tuple[Ladder, ...]:
    """Features joined where each is the strongest of what the other gets or gives along the stream.

    Two features of consecutive layers at one token are one ladder if the edge is the receiver's largest, most of it is
    passed along, and of all that the sender passes along it is the largest.
    """
    largest: dict[int, Edge] = {}
    onward: dict[int, Edge] = {}
    for edge in edges:
        if edge.target not in largest or abs(edge.weight) > abs(largest[edge.target].weight):
            largest[edge.target] = edge
    for edge in largest.values():
        mainly = edge.passed > 0 and edge.passed >= abs(edge.weight) / 2
        both = nodes[edge.source].kind == nodes[edge.target].kind == "feature"
        if mainly and both and (edge.source not in onward or edge.passed > onward[edge.source].passed):
            onward[edge.source] = edge
    reached = {edge.target for edge in onward.values()}
    found = []
    for i, node in enumerate(nodes):
        if node.kind != "feature" or i in reached:
            continue
        chain = [i]
        while chain[-1] in onward:
            chain.append(onward[chain[-1]].target)
        first = largest.get(i)
        from_token = (
            first is not None and nodes[first.source].kind == "embedding" and first.passed >= abs(first.weight) / 2
        )
        found.append(Ladder(tuple(chain), None if from_token else node.layer))
    return tuple(found)
