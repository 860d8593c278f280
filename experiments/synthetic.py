"""Residuals whose features are known: a synthetic generator after SynthSAEBench's ideas.

Features have unit directions, fire with Zipf's frequencies and together with others (a Gaussian copula of few factors),
some only where their parent does (a hierarchy), with strengths of their own, under noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from qwen_scope.sae import JumpReLU


@dataclass(frozen=True, eq=False)
class Planted:
    """A world of features.

    Attributes:
        directions: `(features, d_model)`, of length 1.   rates: how often each fires, given its parent if any.
        parent: of each its parent, or -1.   loadings: `(features, factors)` of the copula; rows of length below 1.
        strengths: the mean strength of each where it fires.   noise: the length of the noise, about.
    """

    directions: Tensor
    rates: np.ndarray
    parent: np.ndarray
    loadings: np.ndarray
    strengths: np.ndarray
    noise: float

    def draw(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Residuals `(tokens, d_model)` and the strengths of the features in them `(tokens, features)`."""
        rng = np.random.default_rng(seed)
        n, factors = self.loadings.shape
        own = np.sqrt(1 - (self.loadings**2).sum(1))
        hidden = rng.normal(size=(tokens, factors)) @ self.loadings.T + rng.normal(size=(tokens, n)) * own
        fires = hidden > norm.isf(self.rates)
        for feature in np.flatnonzero(self.parent >= 0):  # parents come first
            fires[:, feature] &= fires[:, self.parent[feature]]
        acts = torch.from_numpy((fires * np.abs(rng.normal(self.strengths, 0.2, size=fires.shape))).astype(np.float32))
        d = self.directions.shape[1]
        noise = torch.from_numpy(rng.normal(size=(tokens, d)).astype(np.float32)) * (self.noise / d**0.5)
        return acts @ self.directions + noise, acts

    def truth(self, threshold: float = 0.3) -> JumpReLU:
        """The dictionary that is the truth: it reads along its directions as far as they can be told apart."""
        enc = torch.linalg.pinv(self.directions).T.contiguous()
        n, d = self.directions.shape
        return JumpReLU(
            enc, self.directions.T.contiguous(), torch.zeros(n), torch.zeros(d), torch.full((n,), threshold),
            hook_point="layers.0.resid_post",
        )  # fmt: skip


def planted(
    roots: int = 24,
    children: int = 1,
    d_model: int = 64,
    *,
    rate: float = 0.3,
    zipf: float = 0.5,
    factors: int = 4,
    correlation: float = 0.4,
    noise: float = 0.2,
    seed: int = 0,
) -> Planted:
    """A world of root features, each with some children that fire only where it does (half of the time).

    Args:
        rate, zipf: the n-th root fires on a share `rate / n**zipf` of tokens.
        correlation: length of the loadings on the factors that features share.
    """
    rng = np.random.default_rng((seed, 1))
    n = roots * (1 + children)
    raw = rng.normal(size=(n, d_model))
    if n <= d_model:  # as far apart as they can be, then a little closer
        raw = np.linalg.qr(raw.T)[0].T + rng.normal(size=raw.shape) * 0.1 / d_model**0.5
    directions = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    loadings = rng.normal(size=(n, factors))
    loadings *= correlation / np.linalg.norm(loadings, axis=1, keepdims=True)
    parent = np.concatenate([np.full(roots, -1), np.repeat(np.arange(roots), children)])
    rates = np.concatenate([rate / np.arange(1, roots + 1) ** zipf, np.full(roots * children, 0.5)])
    strengths = rng.uniform(0.8, 1.4, size=n)
    return Planted(torch.from_numpy(directions.astype(np.float32)), rates, parent, loadings, strengths, noise)
