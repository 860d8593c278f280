"""sparsify folders: `cfg.json` and `sae.safetensors`. It reads `x - b_dec`, so `b_enc` is folded both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qwen_scope.errors import FormatError

from ..base import SAE, check_weights
from . import hooks, weight_folding
from .layout import (
    Layout,
    Parsed,
    Place,
    Written,
    identity_metadata,
    identity_of,
    integer,
    need_keys,
    need_layer,
    refuse,
    text,
)


def hook_of_sparsify(config: Mapping[str, Any]) -> hooks.Hook | None:
    """The hook point in `hookpoint`, a key of ours that sparsify passes over."""
    return hooks.about(text(config, "hookpoint"))


KEYS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def read_sparsify(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], place: Place
) -> Parsed:
    """`encoder.weight (d_sae, d_in)`, `W_dec (d_sae, d_in)`. `normalize_decoder` only concerns training.

    The folder's name is the module whose output is read: `layers.12` is the residual after layer 12, `layers.12.mlp`
    what its MLP writes.
    """
    allowed = {"activation": ("topk",), "signed": (False,), "skip_connection": (False,), "transcode": (False,)}
    refuse(config, allowed, "a sparsify SAE")
    need_keys(tensors, KEYS)
    W_enc, W_dec, b_dec = tensors["encoder.weight"], tensors["W_dec"].T, tensors["b_dec"]
    check_weights(W_enc, W_dec, tensors["encoder.bias"], b_dec)
    b_enc = weight_folding.without_b_dec(W_enc, tensors["encoder.bias"], b_dec)
    k, d_in = integer(config, "k"), integer(config, "d_in")
    if d_in is None:
        raise FormatError("the config of a sparsify SAE must say 'd_in'")
    factor = config.get("expansion_factor")
    width = config.get("num_latents") or (d_in * factor if isinstance(factor, int) else None)
    said = identity_of(metadata)
    names = {"the weights file": metadata.get("hook_point"), "the config": text(config, "hookpoint")}
    if not any(names.values()):
        names = {"its folder": hooks.module_in(place.folder)}
    return Parsed(
        tensors={"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec},
        architecture="topk",
        k=k,
        hook=hooks.together(names, "a sparsify SAE"),
        group=said["group"],
        layer=said["layer"],
        fingerprint=said["fingerprint"],
        claims={"d_sae": width, "d_model": d_in},
        meta={"sparsify": dict(config)} | ({"model": config["model"]} if config.get("model") else {}),
    )


def write_sparsify(sae: SAE) -> Written:
    """The folder sparsify loads from disk, with `encoder.bias = b_enc + W_enc @ b_dec`."""
    layer = need_layer(sae)
    tensors = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": weight_folding.with_b_dec(sae.W_enc, sae.b_enc, sae.b_dec),
        "W_dec": sae.W_dec.T,
        "b_dec": sae.b_dec,
    }
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
        "hookpoint": hooks.module_name(hooks.of_sae(sae.hook_point, layer)),
    }
    return Written(tensors, config, identity_metadata(sae))


SPARSIFY = Layout(
    name="sparsify",
    weights=re.compile(r"(?P<folder>(?:.*/)?)sae\.safetensors"),
    weights_name=lambda layer: "sae.safetensors",
    config_name="cfg.json",
    config_of=lambda match: ("cfg.json",),
    config_needed=True,
    shared=False,
    container="safetensors",
    hook_of=hook_of_sparsify,
    read=read_sparsify,
    write=write_sparsify,
    computes_as_stored=True,
    kinds=("topk",),
)
