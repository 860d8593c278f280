"""Targeted probe perturbation and spurious-correlation removal, as SAEBench defines them (Karvonen et al. 2025).

Linear probes tell classes by the mean residual of a text. The features with the largest effect on a probe (difference
of mean activation between its classes times what the direction adds to its logit) are ablated, and the probes are asked
again. Since means and ablation are linear, the mean residual of a text without some features is its mean residual less
their mean activations times their directions, so nothing is decoded token by token.

Random numbers are drawn in SAEBench's order, so the same residuals give its figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from math import ceil, nan
from typing import TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from qwen_scope.sae import SAE

from .bags import Bags

T = TypeVar("T")

NS = (2, 5, 10, 20, 50, 100, 500)
"""How many features are ablated."""
EPOCHS, BATCH, RATE, L1, SEED = 20, 16, 1e-3, 1e-3, 42
"""How probes are trained: SAEBench's settings. The smaller a batch, the more of a spurious correlation is learnt."""


@dataclass(frozen=True, eq=False)
class Probes:
    """Classes of texts with a linear probe for each.

    Attributes:
        train, test: the texts of each class; of SCR also of each class' other side.
        other: by class the class that it is told from; None where it is told from all others (TPP).
        probes: by class.   clean: accuracy by probe and by the data that it is asked about.
        state: of the random numbers, for the draws that follow.
        x: mean residuals of the texts of each class that are tested.
    """

    train: Mapping[str, Bags]
    test: Mapping[str, Bags]
    other: Mapping[str, str] | None
    probes: Mapping[str, nn.Linear]
    clean: Mapping[tuple[str, str], float]
    state: Tensor
    x: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The classes that have a probe of their own purpose."""
        return list(self.other or self.train)


@contextmanager
def drawn(state: Tensor | int) -> Iterator[None]:
    """Random numbers from a seed or a state on; those of the caller stay as they were."""
    with torch.random.fork_rng(devices=[]):
        if isinstance(state, int):
            torch.manual_seed(state)
        else:
            torch.set_rng_state(state)
        yield


def train_probes(train: Mapping[str, Bags], test: Mapping[str, Bags], other: Mapping[str, str] | None) -> Probes:
    """Train a probe for every class, and ask it.

    Args:
        other: for spurious correlations the pairs of classes; None tells each class from all others.
    """
    means = [{name: bags.means() for name, bags in side.items()} for side in (train, test)]
    with drawn(SEED), torch.enable_grad():
        probes = {name: _probe(*_sides(means[0], name, other), *_sides(means[1], name, other)) for name in train}
        clean = _accuracies(probes, means[1], other, list(other or train))
        state = torch.get_rng_state()
    return Probes(train, test, other, probes, clean, state, means[1])


def perturbed(sae: SAE, given: Probes, ns: Sequence[int] = NS) -> dict[str, dict[int, dict[tuple[str, str], float]]]:
    """Accuracies, by probe and data, without the `n` features that matter most to the probe of a class."""
    W_dec = sae.W_dec.detach().float().cpu()
    acts = [{name: bags.mean_acts(sae) for name, bags in side.items()} for side in (given.train, given.test)]
    out: dict[str, dict[int, dict[tuple[str, str], float]]] = {}
    with drawn(given.state), torch.no_grad():
        effects = {
            name: _effects(acts[0], name, given.other, W_dec, given.probes[name].weight[0]) for name in given.names
        }
        for name in given.names:
            out[name] = {}
            for n in ns:
                chosen = _strongest(effects[name], min(n, sae.d_sae))
                without = {
                    one: given.x[one] - acts[1][one].index_select(1, chosen).to_dense() @ W_dec[:, chosen].T
                    for one in given.test
                }
                out[name][n] = _accuracies(given.probes, without, given.other, given.names)
    return out


def tpp(sae: SAE, given: Probes, ns: Sequence[int] = NS) -> dict[str, float]:
    """Targeted probe perturbation: what ablating the features of a class costs its probe less what it costs others.

    The mean over classes for each number of features, in accuracy; 0 where nothing is hit, or everything alike.
    """
    found, names = perturbed(sae, given, ns), given.names
    out = {}
    for n in ns:
        scores = []
        for name in names:
            fall = {one: given.clean[one, one] - found[name][n][one, one] for one in names}
            scores.append(fall.pop(name) - sum(fall.values()) / len(fall))
        out[f"tpp {n}"] = sum(scores) / len(scores)
    return out


WANTED, SPURIOUS, BOTH = "wanted", "spurious", "both"
OTHER = {SPURIOUS: "not spurious", WANTED: "not wanted", BOTH: "neither"}
"""The classes of spurious-correlation removal, each with its other side, in SAEBench's order."""


def scr(sae: SAE, given: Probes, ns: Sequence[int] = NS) -> dict[str, float]:
    """Spurious-correlation removal: how far ablation brings a probe that learnt both attributes to one of them.

    Of the two directions the one in which the probe was worse to begin with; 1 is the accuracy of a probe that was
    trained on the attribute alone, 0 no change.
    """
    found = perturbed(sae, given, ns)
    worse = {to: given.clean[BOTH, to] for to in (WANTED, SPURIOUS)}
    if worse[WANTED] == worse[SPURIOUS]:
        return {f"scr {n}": nan for n in ns}
    to = min(worse, key=lambda one: worse[one])
    away = SPURIOUS if to == WANTED else WANTED
    before, best = worse[to], given.clean[to, to]
    return {f"scr {n}": (found[away][n][BOTH, to] - before) / (best - before) if best != before else nan for n in ns}


def spurious(quadrants: Mapping[tuple[int, int], Sequence[T]]) -> dict[str, list[T]]:
    """The texts of each class: `wanted` and `spurious` have both values of the other attribute, `both` has one alone.

    Args:
        quadrants: by wanted and spurious attribute the texts; as many of (1, 1) and (0, 0) as of the others twice.
    """
    q = min(len(quadrants[1, 0]), len(quadrants[0, 1]), len(quadrants[1, 1]) // 2, len(quadrants[0, 0]) // 2)
    part = {which: list(some[:q]) for which, some in quadrants.items()}
    return {
        SPURIOUS: part[1, 1] + part[0, 1],
        OTHER[SPURIOUS]: part[1, 0] + part[0, 0],
        WANTED: part[1, 1] + part[1, 0],
        OTHER[WANTED]: part[0, 1] + part[0, 0],
        BOTH: list(quadrants[1, 1][: 2 * q]),
        OTHER[BOTH]: list(quadrants[0, 0][: 2 * q]),
    }


Place = tuple[str, int]


def _drawn(
    sizes: Mapping[str, int], name: str, other: Mapping[str, str] | None
) -> tuple[list[Place], Int64[Tensor, " n"]]:
    """The other side of a class as (class, text), as many as the class has texts, and the order of both sides together.

    The draws are SAEBench's: for a class against all others as many of each, then as many as the class has, then all.
    """
    n = sizes[name]
    if other is None:
        rest = [one for one in sizes if one != name]
        places = [(one, int(i)) for one in rest for i in torch.randperm(sizes[one])[: ceil(n / len(rest))]]
    else:
        against = other.get(name) or next(key for key, value in other.items() if value == name)
        places = [(against, i) for i in range(sizes[against])]
    places = [places[int(i)] for i in torch.randperm(len(places))[:n]]
    return places, torch.randperm(n + len(places))


def _sides(of: Mapping[str, Tensor], name: str, other: Mapping[str, str] | None) -> tuple[Tensor, Tensor]:
    """Rows of a class and of its other side in a random order, and which are of the class (1)."""
    places, order = _drawn({one: len(x) for one, x in of.items()}, name, other)
    x = torch.cat([of[name], torch.stack([of[one][i] for one, i in places])])
    return x[order], (order < len(of[name])).long()


def _probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> nn.Linear:
    """A linear probe; of its epochs the one that does best on the test texts."""
    probe, best, kept = nn.Linear(x.shape[1], 1), -1.0, None
    optimizer, loss_of = torch.optim.AdamW(probe.parameters(), lr=RATE), nn.BCEWithLogitsLoss()
    for _ in range(EPOCHS):
        for some in torch.randperm(len(x)).split(BATCH):
            loss = loss_of(probe(x[some]).squeeze(-1), y[some].float()) + L1 * probe.weight.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (right := _accuracy(probe, test_x, test_y)) > best:
            best, kept = right, deepcopy(probe)
    assert kept is not None, "an accuracy is at least 0"
    return kept


@torch.no_grad()
def _accuracy(probe: nn.Linear, x: Tensor, y: Tensor) -> float:
    return float(((probe(x).squeeze(-1) > 0).long() == y).float().mean())


def _accuracies(
    probes: Mapping[str, nn.Linear], of: Mapping[str, Tensor], other: Mapping[str, str] | None, names: Sequence[str]
) -> dict[tuple[str, str], float]:
    """By probe and data: each on its own, and for spurious correlations each on the others' as well."""
    out = {(name, name): _accuracy(probes[name], *_sides(of, name, other)) for name in names}
    if other is None:
        return out
    for name in names:
        x, y = _sides(of, name, other)
        out |= {(one, name): _accuracy(probes[one], x, y) for one in names if one != name}
    return out


def _effects(
    acts: Mapping[str, Tensor], name: str, other: Mapping[str, str] | None, W_dec: Tensor, weight: Tensor
) -> Tensor:
    """What each feature does to a probe."""
    places, _ = _drawn({one: x.shape[0] for one, x in acts.items()}, name, other)
    here = _mean(acts[name], torch.ones(acts[name].shape[0]))
    there = torch.zeros_like(here)
    for one in acts:
        counts = torch.zeros(acts[one].shape[0])
        for whose, i in places:
            counts[i] += whose == one
        if counts.any():
            there += _mean(acts[one], counts) * (counts.sum() / len(places))
    apart = here - there
    # Only activations of the class count for a targeted probe; a spurious attribute can be on either side.
    return (apart.clamp(min=0) * (weight @ W_dec)) if other is None else (apart * (weight @ W_dec)).abs()


def _mean(acts: Tensor, counts: Tensor) -> Tensor:
    return torch.sparse.mm(acts.T, counts[:, None])[:, 0] / counts.sum()


def _strongest(effects: Tensor, n: int) -> Tensor:
    return effects.topk(min(n, int((effects != 0).sum()))).indices
