"""The activation of a few features without encoding all: exact, and as cheap as the SAE's kind allows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from qwen_scope.errors import InputError
from qwen_scope.sae import SAE, JumpReLU, TopK

# Up to as many rows, all pre-activations are held at once.
FEW_ROWS = 64

# One feature in `PROBED` is looked at first; `MARGIN` is how far it has to be ahead, as a share of the largest
# pre-activation.
PROBED, MARGIN = 16, 1e-4


def activations_reference(sae: SAE, h: Float[Tensor, "rows d_model"], features: list[int]) -> Float[Tensor, "rows n"]:
    """The definition: what `encode` says about these features, in fp32."""
    return sae.encode(h).select(features)


def activations(sae: SAE, h: Float[Tensor, "rows d_model"], features: list[int]) -> Float[Tensor, "rows n"]:
    """`activations_reference` with less work.

    A JumpReLU feature depends on its own pre-activation alone. A TopK feature is active if it is positive and fewer
    than k others come before it (larger, or equal with a lower index): counting needs no sort. Many rows are encoded
    in tiles as usual.

    Raises:
        InputError: a residual that is not finite.
    """
    with torch.no_grad():
        if isinstance(sae, JumpReLU):
            pre = sae.pre_acts(h, features)
            _check(pre)
            return torch.where(pre > sae.threshold[features], pre.relu(), 0)
        if not isinstance(sae, TopK) or len(h) > FEW_ROWS or len(features) > sae.k:
            return activations_reference(sae, h, features)
        if _surely_silent(sae, h, features):
            return torch.zeros(len(h), len(features), device=sae.device)
        pre = sae.pre_acts(h)
        own = pre[:, features]
        _check(own)
        out = torch.zeros_like(own)
        for i, feature in enumerate(features):
            mine = own[:, i : i + 1]
            if not bool((mine > 0).any()):
                continue
            before = (pre > mine).sum(-1) + (pre[:, :feature] == mine).sum(-1)
            out[:, i] = torch.where(before < sae.k, mine[:, 0].clamp(min=0), 0)
        return out


def _surely_silent(sae: TopK, h: Tensor, features: list[int]) -> bool:
    """Whether a sample of the dictionary already shows that none of the features is active on any row.

    It is enough that k features of the sample come before it, by a margin far above the rounding of a dot product.
    True is certain; False only means that all must be asked.
    """
    sample = sae.d_sae // PROBED
    if sample < 2 * sae.k:
        return False
    own = sae.pre_acts(h, features)
    # the first ones: a slice of the matrix is no copy, as a random choice would be
    pre = linear(h.to(sae.device).float(), sae.W_enc[:sample].float(), sae.b_enc[:sample])
    margin = MARGIN * pre.abs().amax(-1, keepdim=True)
    ahead = (pre[:, None, :] > (own + margin)[:, :, None]).sum(-1)
    return bool(((own < -margin) | (ahead >= sae.k)).all())


def _check(pre: Tensor) -> None:
    if not bool(pre.isfinite().all()):
        raise InputError(
            "a residual to steer is not finite: it holds NaN or infinity; load the model with dtype bfloat16 or float32"
        )
