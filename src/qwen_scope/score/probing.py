"""Sparse probing: what a few features tell of a text, beside logistic regression on the whole residual.

The settings are those of sae-probes (Kantamneni et al. 2025): the last token of each text, features ranked on the
training texts by the difference of their class means, each in units of its mean activation, and logistic regression
whose strength of regularisation is chosen on the last fifth of the training texts, at most 100.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, LoadedModel, capture
from qwen_scope.sae import SAE, FeatureActs
from qwen_scope.text import padded

from .labelled import Labelled

KS = (1, 2, 5, 16)
STRENGTHS = np.logspace(5, -5, 10)
SEED = 42  # of the split, as there
FEWEST = 40  # texts of a dataset that are worth a probe


Known = dict[tuple[int, ...], Tensor]


@dataclass(frozen=True, eq=False)
class Split:
    """A dataset as it is probed: residuals `(n, d_model)` of the last tokens, labels, and which texts train or test."""

    x: Float[Tensor, "n d_model"]
    y: Int64[np.ndarray, " n"]
    train: Int64[np.ndarray, " train"]
    test: Int64[np.ndarray, " test"]


@dataclass(frozen=True)
class Probed:
    """AUROC on the test texts.

    Attributes:
        dataset: which.   train, test: how many texts.
        features: by k, of the `k` features that were chosen on the training texts.
        residual: of logistic regression on the residual: the baseline; None where it was not asked for.
    """

    dataset: str
    train: int
    test: int
    features: dict[int, float]
    residual: float | None


def balanced_split(
    y: Int64[np.ndarray, " n"], n_train: int, n_test: int, seed: int = SEED
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]:
    """Texts to train and to test on, half of each class, drawn as sae-probes draws them.

    Raises:
        InputError: a class has too few texts.
    """
    rng = np.random.RandomState(seed)
    sides = [np.where(y == 1)[0], np.where(y == 0)[0]]
    wanted = [[int(np.ceil(n / 2)), n - int(np.ceil(n / 2))] for n in (n_train, n_test)]
    if any(len(side) < wanted[0][i] + wanted[1][i] for i, side in enumerate(sides)):
        raise InputError(
            f"{len(sides[0])} and {len(sides[1])} texts of the two classes are too few for {n_train} to train and"
            f" {n_test} to test on"
        )
    first = [rng.choice(side, size=n, replace=False) for side, n in zip(sides, wanted[0], strict=True)]
    left = [np.setdiff1d(side, some) for side, some in zip(sides, first, strict=True)]
    second = [rng.choice(side, size=n, replace=False) for side, n in zip(left, wanted[1], strict=True)]
    train, test = (rng.permutation(np.concatenate(both)) for both in (first, second))
    return train.astype(np.int64), test.astype(np.int64)


def drawn(data: Labelled, rows: int) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]:
    """Which texts of a dataset train and test: at most `rows` in all, five of seven to train, half of each class.

    Raises:
        InputError: fewer than `FEWEST` texts that can be balanced.
    """
    most = min(rows, 2 * int(np.bincount(data.y, minlength=2)[:2].min()))
    if most < FEWEST:
        raise InputError(f"{data.name} has {most} texts in classes of one size; {FEWEST} are the least")
    n_train = most * 5 // 7 // 2 * 2
    return balanced_split(data.y, n_train, (most - n_train) // 2 * 2)


def read_split(
    loaded: LoadedModel,
    point: HookPoint,
    data: Labelled,
    *,
    rows: int = 700,
    tokens: int = 256,
    batch: int = 16,
    known: Known | None = None,
) -> Split:
    """The residuals of the texts that are used, at their last token; of a longer text the last `tokens` tokens.

    Args:
        rows: how many texts at most; five of seven train.
        known: residuals by ids that were read before at this point, since datasets share texts; what is read is added.

    Raises:
        InputError: fewer than `FEWEST` texts that can be balanced.
    """
    train, test = drawn(data, rows)
    used = np.concatenate([train, test])
    ids = [loaded.tokenizer(data.texts[i])["input_ids"][-tokens:] or [0] for i in used.tolist()]
    known = {} if known is None else known
    new = list({tuple(row): None for row in ids if tuple(row) not in known})
    if new:
        known.update(zip(new, last_residuals(loaded, point, new, batch), strict=True))
    x = torch.stack([known[tuple(row)] for row in ids])
    return Split(x, data.y[used], np.arange(len(train)), np.arange(len(train), len(used)))


def last_residuals(
    loaded: LoadedModel, point: HookPoint, ids: Sequence[Sequence[int]], batch: int
) -> Float[Tensor, "n d_model"]:
    """The residual at the last token of each row of ids, read in batches of like length."""
    out: dict[int, Tensor] = {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        rows, mask = padded([tuple(ids[i]) for i in some])
        h = capture(loaded.model, rows, [point], mask)[point]
        last = mask.sum(1).long().to(h.device) - 1
        found = h[torch.arange(len(some), device=h.device), last].float().cpu()
        out |= dict(zip(some, found, strict=True))
    return torch.stack([out[i] for i in range(len(ids))])


def probe(sae: SAE, split: Split, name: str, ks: Sequence[int] = KS, seed: int = 1, *, baseline: bool = True) -> Probed:
    """AUROC of the best few features of an SAE, and with `baseline` of the residual, on the test texts of a split."""
    acts = sae.encode(split.x.to(sae.device)).to("cpu")
    ranked = ranking(acts[torch.from_numpy(split.train)], split.y[split.train])
    found = {}
    for k in ks:
        x = acts.select(ranked[:k].tolist()).numpy()
        found[k] = auroc_of(x, split, "l1", seed)
    residual = auroc_of(split.x.numpy(), split, "l2", seed) if baseline else None
    return Probed(name, len(split.train), len(split.test), found, residual)


def ranking(acts: FeatureActs, y: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " d_sae"]:
    """Features by the absolute difference of their class means, each over its mean activation where it fires."""
    sums = torch.zeros(2, acts.width, dtype=torch.float64)
    fires = torch.zeros(acts.width, dtype=torch.float64)
    for side in (0, 1):
        some = acts[torch.from_numpy(y == side)]
        sums[side].index_add_(0, some.indices.flatten().long(), some.values.flatten().double())
        fires.index_add_(0, some.indices.flatten().long(), (some.values > 0).flatten().double())
    typical = sums.sum(0) / (fires + 1e-6) + 1e-6
    counts = torch.tensor([(y == side).sum() for side in (0, 1)], dtype=torch.float64)[:, None]
    apart = (sums / counts / typical).diff(dim=0)[0].abs()
    return np.argsort(-apart.numpy(), kind="stable")


def auroc_of(x: Float[np.ndarray, "n d"], split: Split, penalty: str, seed: int) -> float:
    """AUROC on the test texts of logistic regression with the strength that does best on the last training texts."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    train, y = x[split.train], split.y[split.train]
    kept = len(train) - min(len(train) // 5, 100)
    # Elastic net with nothing but its first half is l1, in the words of every version of scikit-learn.
    solver: Any = {"penalty": "elasticnet", "l1_ratio": 1.0, "solver": "saga"} if penalty == "l1" else {}

    def fitted(strength: float, a: np.ndarray, b: np.ndarray) -> LogisticRegression:
        with warnings.catch_warnings():
            # Some strengths do not converge in as many steps as sae-probes allows; they score as they stand.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", FutureWarning)  # of the name of the penalty
            return LogisticRegression(C=strength, random_state=seed, max_iter=1000, **solver).fit(a, b)

    def score(model: LogisticRegression, a: np.ndarray, b: np.ndarray) -> float:
        return float(roc_auc_score(b, model.predict_proba(a)[:, 1])) if len(set(b.tolist())) == 2 else 0.5

    chosen = [score(fitted(c, train[:kept], y[:kept]), train[kept:], y[kept:]) for c in STRENGTHS]
    order = np.random.RandomState(seed).permutation(len(train))
    best = fitted(float(STRENGTHS[int(np.argmax(chosen))]), train[order], y[order])
    return score(best, x[split.test], split.y[split.test])
