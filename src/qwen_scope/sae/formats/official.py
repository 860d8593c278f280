"""The layout the SAEs were released in, and the same tensors in a memory-mapped safetensors file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from qwen_scope.errors import FormatError

from ..base import SAE
from . import hooks
from .eight_bits import open_packed
from .layout import (
    KEPT,
    Layout,
    Parsed,
    Place,
    Written,
    identity_metadata,
    identity_of,
    inside,
    integer,
    known_kind,
    need_keys,
    need_layer,
    text,
)

MATRICES = ("W_enc", "W_dec", "b_enc", "b_dec")


def read_official(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], place: Place
) -> Parsed:
    """`W_enc (d_sae, d_model)`, `W_dec (d_model, d_sae)`, `b_enc`, `b_dec` and what the architecture calls its own.

    Identity stands in the metadata of a safetensors file, and in the config of a `.pt` folder.
    """
    said_kind = text(config, "architecture") or metadata.get("architecture") or "topk"
    kind = known_kind(said_kind, "an SAE in the official layout")
    need_keys(tensors, (*MATRICES, *kind.own))
    said = identity_of(metadata)
    k, k_inside = integer(config, "k"), inside(metadata, "k")
    if None not in (k, k_inside) and k != k_inside:
        raise FormatError(f"the config says k={k}, but the weights file says k={k_inside}")
    layer = place.layer if said["layer"] is None else said["layer"]
    names = {"the config": text(config, "hook_point"), "the weights file": metadata.get("hook_point")}
    hook = hooks.together(names, "an SAE in the official layout", layer) or hooks.Hook(layer, "resid_post")
    if hook.before:
        raise FormatError("an SAE in the official layout can't say resid_pre; say resid_post of the layer before")
    fingerprints = config.get("fingerprints")
    listed = text(fingerprints, str(layer)) if isinstance(fingerprints, dict) else None
    return Parsed(
        tensors={name: tensors[name] for name in tensors},
        architecture=kind.architecture,
        k=k_inside if k is None else k,
        hook=hook,
        group=said["group"] or text(config, "group"),
        layer=layer,
        fingerprint=said["fingerprint"] or listed,
        claims={"d_sae": integer(config, "d_sae"), "d_model": integer(config, "d_model")},
        meta={"model": config["model"]} if "model" in config else {},
    )


def write_official(sae: SAE) -> Written:
    """The released tensors, and `"architecture"` with the tensors of its own, such as `threshold`."""
    layer = need_layer(sae)
    tensors = {name: getattr(sae, name) for name in MATRICES} | sae.own_tensors()
    config = {
        "architecture": sae.architecture,
        **({"k": sae.k} if sae.k else {}),
        "hook_point": hooks.of_sae(sae.hook_point, layer).stream,
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "group": sae.identity.group,
        **({"model": sae.meta["model"]} if "model" in sae.meta else {}),
        **{key: sae.meta[key] for key in KEPT if key in sae.meta},
        "fingerprints": {str(layer): sae.identity.fingerprint},
    }
    return Written(tensors, config, identity_metadata(sae))


OFFICIAL = Layout(
    name="official",
    weights=re.compile(r"(?P<folder>)layer(?P<layer>[0-9]+)\.sae\.pt"),
    weights_name=lambda layer: f"layer{layer}.sae.pt",
    config_name="config.json",
    config_of=lambda match: ("config.json",),
    config_needed=False,
    shared=True,
    container="pt",
    hook_of=lambda config: None,
    read=read_official,
    write=write_official,
)


SAFETENSORS = replace(
    OFFICIAL,
    name="safetensors",
    weights=re.compile(r"(?P<folder>)layer(?P<layer>[0-9]+)\.sae\.safetensors"),
    weights_name=lambda layer: f"layer{layer}.sae.safetensors",
    container="safetensors",
    eight_bits=True,
    open_file=open_packed,
)
