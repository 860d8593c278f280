"""sae_lens folders: `cfg.json` and `sae_weights.safetensors`, before and after its version 6, and look-alikes."""

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
    known_kind,
    need_keys,
    need_layer,
    refuse,
    text,
)
from .sae_lens_config import described, sae_lens_config, sae_lens_tensors

WHAT = "a sae_lens SAE"
MATRICES = ("W_enc", "W_dec", "b_enc", "b_dec")
KINDS = ("topk", "jumprelu")  # of those that sae_lens has, the ones that are read here


def read_sae_lens(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], place: Place
) -> Parsed:
    """`W_enc (d_in, d_sae)`, `W_dec (d_sae, d_in)`; what is done to the residual and the activations is folded in.

    A missing `apply_b_dec_to_input` means True, in old configs and in new ones: that is what sae_lens takes it for.
    """
    said = described(config)
    architecture, k = architecture_of(config)
    own = known_kind(architecture, WHAT, KINDS).own
    refuse_unfoldable(tensors, config, name_of(config))
    need_keys(tensors, (*MATRICES, *own), optional=("scaling_factor",))
    W_enc, W_dec, b_enc, b_dec = tensors["W_enc"].T, tensors["W_dec"].T, tensors["b_enc"], tensors["b_dec"]
    check_weights(W_enc, W_dec, b_enc, b_dec)
    if config.get("apply_b_dec_to_input", True):
        b_enc = weight_folding.without_b_dec(W_enc, b_enc, b_dec)
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = weight_folding.decoder_norms(W_dec)
        W_enc, b_enc = weight_folding.scaled_rows(W_enc, norms), (b_enc.double() * norms).float()
        W_dec = weight_folding.scaled_rows(W_dec.T, 1 / norms).T
    read = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    identity = identity_of(metadata)
    model = said.get("model_name") or text(config, "model_name")
    return Parsed(
        tensors=read | {name: tensors[name] for name in own},
        architecture=architecture,
        k=k,
        hook=checked_hook(config, metadata.get("hook_point")),
        group=identity["group"],
        layer=identity["layer"],
        fingerprint=identity["fingerprint"],
        claims={"d_sae": integer(config, "d_sae"), "d_model": integer(config, "d_in")},
        meta={"sae_lens": dict(config)} | ({"model": model} if model else {}),
    )


def architecture_of(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """The architecture and k; before version 6 a "standard" SAE with the activation function topk is a topk one."""
    function = config.get("activation_fn") or config.get("activation_fn_str")
    arguments = config.get("activation_fn_kwargs")
    k = integer(config, "k")
    if function == "topk" and isinstance(arguments, dict) and arguments.get("k") is not None:
        return "topk", integer(arguments, "k")
    return text(config, "architecture") or "standard", k


def name_of(config: Mapping[str, Any]) -> str | None:
    """The hook name, wherever this version keeps it."""
    for place in (described(config), config):
        for key in ("hook_name", "hook_point", "hf_hook_name"):
            if text(place, key):
                return text(place, key)
    return None


def old_layer(config: Mapping[str, Any]) -> int | None:
    """The layer in the old key `hook_layer`."""
    old = config.get("hook_layer", config.get("hook_point_layer"))
    return old if isinstance(old, int) and not isinstance(old, bool) else None


def hook_of_sae_lens(config: Mapping[str, Any]) -> hooks.Hook | None:
    """The hook point in the hook name; the old key `hook_layer` where that holds no layer."""
    layer = old_layer(config)
    hook = hooks.about(name_of(config), layer)
    return hooks.Hook(layer, "resid_post") if hook is None and layer is not None else hook


def checked_hook(config: Mapping[str, Any], ours: str | None) -> hooks.Hook | None:
    """Where the SAE reads, from the hook name, its twin in transformers' names and what this package wrote.

    Raises:
        FormatError: a place that is not read here, or names that contradict each other.
    """
    name, layer = name_of(config), old_layer(config)
    found = hooks.together({"hook_name": name}, WHAT, layer)
    # The twin of the input of a layer is the module behind or before it, whoever wrote it.
    twin = None if found and found.before else text(described(config), "hf_hook_name")
    names = {"hook_name": str(found) if found and found.layer is not None else name, "the weights file": ours}
    if twin and (parsed := hooks.about(twin)) and parsed.stream != "other":
        names["hf_hook_name"] = twin
    said = hooks.layer_in(name)
    if layer is not None and said is not None and layer != said:
        raise FormatError(f"{WHAT} contradicts itself: hook_name is {name!r}, and hook_layer is {layer}")
    found = hooks.together(names, WHAT, layer)
    return hooks.Hook(layer, "resid_post") if found is None and layer is not None else found


def refuse_unfoldable(tensors: Mapping[str, Tensor], config: Mapping[str, Any], hook: str | None) -> None:
    """Raise FormatError for what sae_lens would do at run time and no weights can do instead."""
    allowed = {"normalize_activations": ("none", False), "reshape_activations": ("none",), "d_out": ()}
    refuse(config, allowed | {"hook_name_out": ()}, WHAT)
    if "hook_z" in (hook or "") and config.get("reshape_activations") is None:
        raise FormatError(f"{WHAT} on {hook} can't be read: it reshapes attention heads")
    factor = tensors.get("scaling_factor")
    if factor is not None and not bool((factor == 1).all()):
        raise FormatError(f"{WHAT} with a finetuning scaling_factor can't be read")


def write_sae_lens(sae: SAE) -> Written:
    """The folder sae_lens loads from disk; every key that has a surprising default is written out."""
    return Written(sae_lens_tensors(sae), sae_lens_config(sae, need_layer(sae)), identity_metadata(sae))


SAE_LENS = Layout(
    name="sae_lens",
    # Some keep all layers in one folder: sae_L11.safetensors, sae_L11_cfg.json.
    weights=re.compile(r"(?P<folder>(?:.*/)?)(?:sae_weights|sae_L(?P<layer>[0-9]+))\.safetensors"),
    weights_name=lambda layer: "sae_weights.safetensors",
    config_name="cfg.json",
    config_of=lambda match: ("cfg.json",) if match["layer"] is None else (f"sae_L{match['layer']}_cfg.json",),
    config_needed=True,
    shared=False,
    container="safetensors",
    hook_of=hook_of_sae_lens,
    read=read_sae_lens,
    write=write_sae_lens,
    computes_as_stored=True,
    kinds=KINDS,
)
