"""The definition of each operation, as short as it can be said. Every other path must equal these."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..acts import FeatureActs


def pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """`x @ W_enc.T + b_enc` in fp32, on the weights' device: `(..., d_model) -> (..., d_sae)`."""
    return linear(x.to(W_enc.device).float(), W_enc.float(), b_enc.float())


def level(pre: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """Pre-activations in which copies of a feature have the value of the first: a product may round them apart."""
    rows = torch.cat([W_enc.float(), b_enc.float()[:, None]], dim=1)
    group = rows.unique(dim=0, return_inverse=True)[1]
    number = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(group, len(rows)).scatter_reduce(0, group, number, "amin")
    return pre[..., first[group]]


def encode_topk_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> FeatureActs:
    """The k largest of `relu(pre)`; equal values by lower index."""
    return FeatureActs.from_dense(level(pre_acts(x, W_enc, b_enc), W_enc, b_enc).relu(), k)


def encode_threshold_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> FeatureActs:
    """`relu(pre)` where `pre > threshold`."""
    pre = level(pre_acts(x, W_enc, b_enc), W_enc, b_enc)
    return FeatureActs.from_dense(pre.relu() * (pre > threshold.float()))


def decode_reference(acts: FeatureActs, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """`W_dec a + b_dec` in fp32."""
    return linear(acts.to(W_dec.device).to_dense().float(), W_dec.float(), b_dec.float())
