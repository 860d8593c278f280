"""What training lowers: the fraction of variance unexplained, and AuxK for features that died."""

from __future__ import annotations

import torch
from torch import Tensor

from .parallel import Ranks, SharedBySlices, SumOfSlices
from .selection import best_of
from .sparse import Active, Decode, Encode
from .weights import Weights

ALONE = Ranks()

# Up to this multiple of k_aux dead features, dense products cost less than sparse ones and about as much memory.
DENSE_MOST = 2


def total_variance(x: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """The sum of squared distances of all rows of `x (n, d)` from their mean: the divisor of both losses."""
    n = ranks.over_rows(x.new_tensor(float(len(x))))
    mean = ranks.over_rows(x.sum(0)) / n
    return ranks.over_rows((x - mean).square().sum())


def fvu(x: Tensor, x_hat: Tensor, variance: Tensor) -> Tensor:
    """Fraction of variance unexplained: the squared error of the rows over the total variance."""
    return (x - x_hat).square().sum() / variance


def pre_acts_of(weights: Weights, x: Tensor, values: Tensor, active: Active, ranks: Ranks) -> Tensor:
    """The known pre-activations `values` of the active entries, with their gradient."""
    bias = SharedBySlices.apply(weights.b_dec, ranks) if weights.pre_bias else None
    return Encode.apply(values, active, x, weights.W_enc, weights.b_enc, bias)


def reconstruct(weights: Weights, acts: Tensor, active: Active, ranks: Ranks) -> Tensor:
    """`W_dec a + b_dec`, `(n, d_model)`."""
    return SumOfSlices.apply(Decode.apply(acts, active, weights.W_dec), ranks) + weights.b_dec


def aux_k(
    weights: Weights, x: Tensor, error: Tensor, dead: Tensor, k_aux: int, variance: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """AuxK (Gao et al. 2024, A.2): how badly the dead features reconstruct what the living ones left over.

    The `k_aux` largest ReLU pre-activations among the dead features reconstruct the detached `error (n, d_model)`.
    The gradient reaches the encoder, its bias and the decoder of dead features and nothing else: both uses of
    `b_dec` are detached. NaN, as from an error of no variance, becomes 0.

    Args:
        dead: which features are dead, `(d_sae,)` bool; in one process at least one of them is.
    """
    seen = x - weights.b_dec.detach() if weights.pre_bias else x
    if ranks.mode != "features" and (few := dead.nonzero().flatten()).numel() <= DENSE_MOST * k_aux:
        return fvu(error.detach(), dense_spare(weights, seen, few, k_aux), variance).nan_to_num(0.0)
    with torch.no_grad():
        values, active = best_of(seen, weights.W_enc, weights.b_enc, k_aux, ranks, among=dead)
    pre = Encode.apply(values, active, seen, weights.W_enc, weights.b_enc, None)
    part = Decode.apply(pre * (values > 0), active, weights.W_dec)
    return fvu(error.detach(), SumOfSlices.apply(part, ranks), variance).nan_to_num(0.0)


def dense_spare(weights: Weights, seen: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """What the dead features reconstruct, `(n, d_model)`, by products of `(n, dead)` tensors."""
    acts = torch.nn.functional.linear(seen, weights.W_enc[dead], weights.b_enc[dead]).relu()
    if len(dead) > k_aux:
        chosen = torch.zeros_like(acts).scatter_(1, acts.detach().topk(k_aux, sorted=False).indices, 1.0)
        acts = acts * chosen
    return acts @ weights.W_dec[dead]
