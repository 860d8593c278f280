"""sparsify folders: `cfg.json` and `sae.safetensors`. It reads `x - b_dec`, so `b_enc` is folded both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qwen_scope.errors import FormatError

from ..base import SAE, check_weights
from . import folds
from .layout import (
    Parsed,
    Place,
    Written,
    hook_point_of,
    identity_metadata,
    identity_of,
    integer,
    layer_in,
    need_keys,
    need_layer,
    needs_sae_of_kind,
    refuse,
    text,
)


def layer_of_sparsify(config: Mapping[str, Any]) -> int | None:
    """The layer in `hookpoint`, a key of ours that sparsify passes over."""
    return layer_in(text(config, "hookpoint"))


KEYS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def read_sparsify(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], place: Place
) -> Parsed:
    """`encoder.weight (d_sae, d_in)`, `W_dec (d_sae, d_in)`. `normalize_decoder` only concerns training.

    The folder's name is the module whose output is read: `layers.12` is the residual after layer 12.
    """
    allowed = {"activation": ("topk",), "signed": (False,), "skip_connection": (False,), "transcode": (False,)}
    refuse(config, allowed, "a sparsify SAE")
    need_keys(tensors, KEYS)
    W_enc, W_dec, b_dec = tensors["encoder.weight"], tensors["W_dec"].T, tensors["b_dec"]
    check_weights(W_enc, W_dec, tensors["encoder.bias"], b_dec)
    b_enc = folds.without_b_dec(W_enc, tensors["encoder.bias"], b_dec)
    k, d_in = integer(config, "k"), integer(config, "d_in")
    if d_in is None:
        raise FormatError("the config of a sparsify SAE must say 'd_in'")
    factor = config.get("expansion_factor")
    width = config.get("num_latents") or (d_in * factor if isinstance(factor, int) else None)
    said = identity_of(metadata)
    module = place.folder.rpartition("/")[2] if layer_in(place.folder) is not None else None
    return Parsed(
        tensors={"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec},
        architecture="topk",
        k=k,
        hook_point=metadata.get("hook_point") or hook_point_of(text(config, "hookpoint") or module),
        group=said["group"],
        layer=said["layer"],
        fingerprint=said["fingerprint"],
        claims={"d_sae": width, "d_model": d_in},
        meta={"sparsify": dict(config)},
    )


def write_sparsify(sae: SAE) -> Written:
    """The folder sparsify loads from disk, with `encoder.bias = b_enc + W_enc @ b_dec`."""
    layer = need_layer(sae)
    needs_sae_of_kind(sae, ("topk",), "sparsify")
    tensors = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": folds.with_b_dec(sae.W_enc, sae.b_enc, sae.b_dec),
        "W_dec": sae.W_dec.T,
        "b_dec": sae.b_dec,
    }
    post = sae.hook_point in (None, f"layers.{layer}.resid_post")
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_model),
        "normalize_decoder": False,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_model,
        "hookpoint": f"layers.{layer}" if post else sae.hook_point,
    }
    return Written(tensors, config, identity_metadata(sae))
