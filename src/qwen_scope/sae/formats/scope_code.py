"""Qwen3.8-27B-Scope (code), only read: `{state: {b_pre, W_enc, b_enc, W_dec}, scale, k, width, tokens}` in a `.pt`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qwen_scope.errors import FormatError

from ..base import check_weights
from . import hooks, weight_folding
from .container import read_checkpoint
from .layout import Layout, Parsed, Place, inside, need_keys


def read_scope_code(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], place: Place
) -> Parsed:
    """`W_enc (d_model, width)` and `W_dec (width, d_model)` on a scaled residual; the biases take scale and `b_pre` in.

    The release computes `a = TopK(relu((x * scale - b_pre) @ W_enc + b_enc))` and `(a @ W_dec + b_pre) / scale`. What
    is returned has the same features active, at `a / scale`, which is in units of the residual, so that both matrices
    stay as they are stored. The release's own value of a feature is ours times `meta["scope_code"]["scale"]`.
    """
    need_keys(tensors, ("W_enc", "W_dec", "b_enc", "b_pre"))
    scale = scale_of(metadata)
    k, width = inside(metadata, "k"), inside(metadata, "width")
    W_enc, W_dec = tensors["W_enc"].T, tensors["W_dec"].T
    check_weights(W_enc, W_dec, tensors["b_enc"], tensors["b_pre"])
    b_enc, b_dec = weight_folding.unscaled(W_enc, tensors["b_enc"], tensors["b_pre"], scale)
    return Parsed(
        tensors={"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec},
        architecture="topk",
        k=k,
        hook=hooks.Hook(place.layer, "resid_post"),
        layer=place.layer,
        claims={"d_sae": width},
        meta={"scope_code": {"scale": scale, **({"tokens": metadata["tokens"]} if "tokens" in metadata else {})}},
    )


def scale_of(metadata: Mapping[str, str]) -> float:
    """What the residual is multiplied by; raises FormatError unless it is a positive number."""
    if "scale" not in metadata:
        raise FormatError("the weights file lacks the number 'scale' beside its 'state'")
    scale = float(metadata["scale"])
    if not (math.isfinite(scale) and scale > 0):
        raise FormatError(f"'scale' in the weights file must be a positive number, not {scale:g}")
    return scale


SCOPE_CODE = Layout(
    name="scope_code",
    # The release's card does not give the names of its files; these are the ones that name a layer and no step.
    weights=re.compile(r"(?P<folder>(?:.*/)?)(?:sae_?)?(?:layer_?|L)(?P<layer>[0-9]+)(?:_sae)?\.pt"),
    weights_name=lambda layer: f"layer{layer}.pt",
    config_name="config.json",
    config_of=lambda match: (),
    config_needed=False,
    shared=True,
    container="pt",
    hook_of=lambda config: None,
    read=read_scope_code,
    kinds=("topk",),
    open_file=read_checkpoint,
)
