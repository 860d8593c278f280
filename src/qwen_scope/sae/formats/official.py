"""The layout the SAEs were released in, and the same tensors in a memory-mapped safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qwen_scope.errors import FormatError

from ..base import SAE
from ..jumprelu import JumpReLU
from . import hooks
from .layout import (
    Parsed,
    Place,
    Written,
    identity_metadata,
    identity_of,
    inside,
    integer,
    need_keys,
    need_layer,
    only_topk_or_jumprelu,
    text,
)

MATRICES = ("W_enc", "W_dec", "b_enc", "b_dec")


def read_official(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], place: Place
) -> Parsed:
    """`W_enc (d_sae, d_model)`, `W_dec (d_model, d_sae)`, `b_enc`, `b_dec`; `threshold` where the config says jumprelu.

    Identity stands in the metadata of a safetensors file, and in the config of a `.pt` folder.
    """
    kind = text(config, "architecture") or metadata.get("architecture") or "topk"
    architecture = only_topk_or_jumprelu(kind, "an SAE in the official layout")
    need_keys(tensors, (*MATRICES, "threshold") if architecture == "jumprelu" else MATRICES)
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
        architecture=architecture,
        k=k_inside if k is None else k,
        hook=hook,
        group=said["group"] or text(config, "group"),
        layer=layer,
        fingerprint=said["fingerprint"] or listed,
        claims={"d_sae": integer(config, "d_sae"), "d_model": integer(config, "d_model")},
        meta={"model": config["model"]} if "model" in config else {},
    )


def write_official(sae: SAE) -> Written:
    """The released tensors, plus `threshold` and `"architecture"` for an SAE that is not TopK."""
    layer = need_layer(sae)
    tensors = {name: getattr(sae, name) for name in MATRICES}
    if isinstance(sae, JumpReLU):
        tensors["threshold"] = sae.threshold
    config = {
        "architecture": sae.architecture,
        **({"k": sae.k} if sae.k else {}),
        "hook_point": hooks.of_sae(sae.hook_point, layer).stream,
        "d_model": sae.d_model,
        "d_sae": sae.d_sae,
        "group": sae.identity.group,
        **({"model": sae.meta["model"]} if "model" in sae.meta else {}),
        "fingerprints": {str(layer): sae.identity.fingerprint},
    }
    return Written(tensors, config, identity_metadata(sae))
