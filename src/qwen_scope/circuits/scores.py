"""How good a graph is: faithfulness by ablation, circuit-tracer's two scores, and agreement between graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.sae import FeatureActs

from .edges import Incoming
from .effects import Place
from .graph import Graph
from .reading import Reading


@dataclass(frozen=True)
class Faithfulness:
    """What some nodes carry by themselves, and what is left without them.

    Attributes:
        kept: the quantity with these features alone.   removed: without them.
        none: without any feature.   all: with all of them.
    """

    kept: float
    removed: float
    none: float
    all: float

    @property
    def faithfulness(self) -> float:
        """`(m(C) - m(none)) / (m(all) - m(none))`: 1 where the nodes carry everything (Marks et al. 2024)."""
        return (self.kept - self.none) / (self.all - self.none)

    @property
    def completeness(self) -> float:
        """The same of what is left without the nodes: 0 where nothing else matters."""
        return (self.removed - self.none) / (self.all - self.none)


def faithfulness(
    reading: Reading,
    nodes: Sequence[Sequence[Place]],
    *,
    means: Mapping[int, Float[Tensor, " d_sae"]] | None = None,
    errors: bool = True,
) -> list[Faithfulness]:
    """How much of the quantity sets of features carry when all others are ablated at every layer at once.

    The model runs with the stream of every layer taken apart anew: features that stay keep what they are in this run,
    the others have their mean or 0, and the error of this run stays or goes. Tokens that do not count keep theirs.

    Args:
        nodes: sets of features at their layers and tokens; errors among them are refused.
        means: by layer, the activation of every ablated feature; zero ablation without.
        errors: whether the error stays.

    Raises:
        InputError: a node that is an error, or a quantity that does not depend on features at all.
    """
    for group in nodes:
        if any(one.feature is None for one in group):
            raise InputError("faithfulness is of sets of features; errors stay or go as a whole (errors=)")
    groups = [frozenset((one.layer, one.position, one.feature) for one in group) for group in nodes]
    runs: list[tuple[frozenset[tuple[int, int, int | None]], bool]] = [(frozenset(), True), (frozenset(), False)]
    runs += [(group, keep) for group in groups for keep in (True, False)]
    values: list[float] = []
    for start in range(0, len(runs), reading.rows):
        some = runs[start : start + reading.rows]
        changes = {layer: _masked(reading, layer, some, means, errors) for layer in reading.layers}
        with torch.no_grad():
            values += reading.run(reading.copies(len(some)), changes).tolist()
    none, everything = values[:2]  # keeping nothing, and removing nothing
    if none == everything:
        raise InputError("the quantity is the same with and without all features, so no share of it can be theirs")
    pairs = zip(values[2::2], values[3::2], strict=True)
    return [Faithfulness(kept, removed, none, everything) for kept, removed in pairs]


def _masked(
    reading: Reading,
    layer: int,
    runs: Sequence[tuple[frozenset[tuple[int, int, int | None]], bool]],
    means: Mapping[int, Tensor] | None,
    errors: bool,
) -> Callable[[Tensor], Tensor]:
    sae = reading.scope.saes[layer]
    counts = torch.tensor([not reason for reason in reading.left_out[layer]], device=sae.device)[:, None]
    wanted = []
    for group, keep in runs:
        keys = [position * sae.d_sae + (feature or 0) for at, position, feature in group if at == layer]
        wanted.append((torch.tensor(sorted(keys), dtype=torch.long, device=sae.device), keep))
    base = None if means is None else means[layer].to(sae.device, torch.float32)
    whole = None if base is None else sae.W_dec.float() @ base

    def change(h: Tensor) -> Tensor:
        live = h.float()
        acts = sae.encode(live)
        keys = acts.indices.long() + torch.arange(h.shape[1], device=h.device)[:, None] * sae.d_sae
        stays = torch.stack([torch.isin(row, known) == keep for row, (known, keep) in zip(keys, wanted, strict=True)])
        kept = FeatureActs(acts.indices, acts.values * stays, acts.width)
        new = sae.decode(kept)
        if base is not None and whole is not None:
            new = new + _means(reading, sae.W_dec, base, whole, wanted)
        if errors:
            new = new + live - sae.decode(acts)
        return torch.where(counts, new, live).to(h.dtype)

    return change


def _means(
    reading: Reading, W_dec: Tensor, base: Tensor, whole: Tensor, wanted: Sequence[tuple[Tensor, bool]]
) -> Float[Tensor, "rows seq d_model"]:
    """What the means of all ablated features add to each token of each run."""
    d_sae, out = W_dec.shape[1], []
    for known, keep in wanted:
        mine = torch.zeros(len(reading.ids), W_dec.shape[0], device=W_dec.device)
        features = known % d_sae
        mine.index_add_(0, known // d_sae, W_dec[:, features].T.float() * base[features][:, None])
        out.append(whole - mine if keep else mine)
    return torch.stack(out)


@dataclass(frozen=True)
class TracerScores:
    """circuit-tracer's scores of a graph (its `compute_graph_scores`), over the graph's nodes.

    Attributes:
        replacement: of the influence that reaches tokens or errors, the share of tokens.
        completeness: the share of what nodes take in that does not come from errors, weighted by influence.
    """

    replacement: float
    completeness: float


def tracer_scores(reading: Reading, places: Sequence[Place], edges: Sequence[Incoming]) -> TracerScores:
    """Influence is followed from the quantity back to tokens and errors, by the size of edges, rows of which sum to 1.

    Args:
        places: the features of the graph.   edges: what `incoming` says of them, the quantity last.
    """
    known_as = {layer: _entries(reading, layer, places) for layer in reading.layers}
    rows, errors, tokens = [], [], []
    for one in edges:
        row = torch.zeros(len(places), dtype=torch.float64)
        if one.layer is not None:
            nodes, entries = known_as[one.layer]
            row[nodes] = one.features.cpu()[entries].abs().double()
        outside = float(one.errors.abs().sum())
        total = float(row.sum()) + outside or 1.0
        rows.append(row / total)
        errors.append(outside / total if one.layer is not None else 0.0)
        tokens.append(outside / total if one.layer is None else 0.0)
    among, last = torch.stack(rows[:-1]) if places else torch.zeros(0, 0, dtype=torch.float64), rows[-1]
    influence, step = torch.zeros_like(last), last
    while float(step.sum()) > 0:  # edges lead from lower to higher layers, so this ends
        influence = influence + step
        step = step @ among
    weights = torch.cat([influence, torch.ones(1, dtype=torch.float64)])
    by_errors = float(weights @ torch.tensor(errors, dtype=torch.float64))
    by_tokens = float(weights @ torch.tensor(tokens, dtype=torch.float64))
    known = float(weights @ (1 - torch.tensor(errors, dtype=torch.float64)))
    reached = by_errors + by_tokens
    # errors and tokens take in nothing, which counts as complete there
    complete = (known + reached) / (float(weights.sum()) + reached)
    return TracerScores(by_tokens / reached if reached else 0.0, complete)


def _entries(reading: Reading, layer: int, places: Sequence[Place]) -> tuple[Tensor, Tensor]:
    """Which of the places are of a layer, and where they stand among its active features."""
    active = reading.active[layer]
    pairs = zip(active.positions.tolist(), active.features.tolist(), strict=True)
    entry = {pair: n for n, pair in enumerate(pairs)}
    mine = [n for n, one in enumerate(places) if one.layer == layer]
    return torch.tensor(mine, dtype=torch.long), torch.tensor(
        [entry[places[n].position, places[n].feature] for n in mine], dtype=torch.long
    )


def overlap(one: Graph, other: Graph, n: int = 20) -> float:
    """Of the `n` features with the largest effects of each graph, at whatever tokens: shared over all (Jaccard)."""
    sides = []
    for graph in (one, other):
        names = dict.fromkeys(graph.nodes[i].name for i in graph.features)
        sides.append(set(list(names)[:n]))
    return len(sides[0] & sides[1]) / len(sides[0] | sides[1]) if sides[0] | sides[1] else 0.0


@dataclass(frozen=True)
class Stability:
    """How much graphs of paraphrases share of their strongest features, against those of unrelated prompts.

    Attributes:
        paraphrases: mean overlap of two graphs of one group.   unrelated: of two of different groups.
    """

    paraphrases: float
    unrelated: float


def stability(groups: Sequence[Sequence[Graph]], n: int = 20) -> Stability:
    """The overlap of the `n` strongest features within groups of paraphrases, and between them as the control.

    Args:
        groups: graphs of prompts that say the same in other words, one group for each thing that is said.

    Raises:
        InputError: fewer than two groups, or no group with two graphs.
    """
    if len(groups) < 2 or not any(len(group) > 1 for group in groups):
        raise InputError("stability compares groups of paraphrases: give two, one of them with two graphs")
    within = [overlap(one, other, n) for group in groups for one, other in combinations(group, 2)]
    between = [overlap(one, other, n) for a, b in combinations(groups, 2) for one in a for other in b]
    return Stability(sum(within) / len(within), sum(between) / len(between))
