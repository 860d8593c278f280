"""dictionary_learning folders: `ae.pt` and `config.json`, for its top-k, batch-top-k and JumpReLU dictionaries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, int32, int64, tensor

from qwen_scope.errors import FormatError

from ..base import SAE, check_weights
from ..jumprelu import JumpReLU
from . import hooks, weight_folding
from .layout import (
    Layout,
    Parsed,
    Place,
    Written,
    identity_metadata,
    identity_of,
    integer,
    kept_meta,
    need_keys,
    need_layer,
    text,
)

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
OURS = "qwen_scope"  # the key of the config that keeps an SAE's identity

# The class that wrote the file, by the name in its config, and the trainer that makes it.
CLASSES = {
    "TopKTrainer": "AutoEncoderTopK",
    "BatchTopKTrainer": "BatchTopKSAE",
    "MatryoshkaBatchTopKTrainer": "MatryoshkaBatchTopKSAE",
    "JumpReluTrainer": "JumpReluAutoEncoder",
}


def trainer_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that describes the dictionary."""
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise FormatError("the config of a dictionary_learning SAE must have an object 'trainer'")
    return trainer


def layer_of_trainer(trainer: Mapping[str, Any]) -> int | None:
    """The layer the trainer was given."""
    layer = trainer.get("layer")
    return layer if isinstance(layer, int) and not isinstance(layer, bool) else None


def hook_of_dictionary(config: Mapping[str, Any]) -> hooks.Hook | None:
    """The hook point the trainer was given; the input of a module is the output of what stands before it."""
    trainer = trainer_of(config)
    layer = layer_of_trainer(trainer)
    hook = hooks.about(text(trainer, "submodule_name"), layer) or hooks.Hook(layer, "resid_post")
    shifts = side_of(config) == "in" and hook.stream == "resid_post" and not hook.before
    return hooks.about("resid_pre", hook.layer) if shifts and hook.layer is not None else hook


def side_of(config: Mapping[str, Any]) -> str:
    """Whether the activations were the `out`put of the module, the `in`put, or both."""
    buffer = config.get("buffer")
    io = buffer.get("io") if isinstance(buffer, dict) else None
    return io if isinstance(io, str) else "out"


def checked_hook(config: Mapping[str, Any], folder: str) -> hooks.Hook | None:
    """Where the dictionary reads.

    Raises:
        FormatError: a place that is not read here, or names that contradict each other.
    """
    trainer, what = trainer_of(config), "a dictionary_learning SAE"
    name, layer = text(trainer, "submodule_name"), layer_of_trainer(trainer)
    hook = hooks.together({"submodule_name": name}, what, layer)
    if hook is None:
        hook = hooks.in_folder(folder) or (None if layer is None else hooks.Hook(layer, "resid_post"))
    own = None if hook is None or hook.layer is None else hook.layer + hook.before
    if layer is not None and own is not None and own != layer:
        raise FormatError(f"{what} contradicts itself: its trainer's layer is {layer}, and it reads {name or folder!r}")
    if (side := side_of(config)) != "out" and hook is not None and not hook.before:
        if side != "in" or hook.stream != "resid_post":
            raise FormatError(f"{what} on {name or hook} with io={side!r} can't be read: it is not an output of that")
        return hooks.read("resid_pre", what, hook.layer)
    return hook


def read_dictionary(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], place: Place
) -> Parsed:
    """A state dict; every kind but JumpReLU reads `x - b_dec`, which is folded into `b_enc`.

    Batch-top-k dictionaries are read with the one threshold they learned, which is how they are used.
    """
    trainer = trainer_of(config)
    kind = text(trainer, "dict_class") or CLASSES.get(text(trainer, "trainer_class") or "", "unknown")
    if kind not in (known := CLASSES.values()):
        raise FormatError(f"a dictionary_learning SAE of class {kind!r} can't be read; {', '.join(known)} can")
    linear = kind in ("AutoEncoderTopK", "BatchTopKSAE")
    threshold = ("threshold",) if kind == "JumpReluAutoEncoder" else ()
    need_keys(tensors, (*(LINEAR if linear else PLAIN), *threshold), optional=("k", "threshold", "group_sizes"))
    if linear:
        W_enc, W_dec, b_enc = tensors["encoder.weight"], tensors["decoder.weight"], tensors["encoder.bias"]
    else:
        W_enc, W_dec, b_enc = tensors["W_enc"].T, tensors["W_dec"].T, tensors["b_enc"]
    check_weights(W_enc, W_dec, b_enc, tensors["b_dec"])
    if kind != "JumpReluAutoEncoder":
        b_enc = weight_folding.without_b_dec(W_enc, b_enc, tensors["b_dec"])
    read = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": tensors["b_dec"]}
    if kind == "JumpReluAutoEncoder":
        read["threshold"] = tensors["threshold"]
    elif kind != "AutoEncoderTopK":
        read["threshold"] = one_threshold(tensors, kind).expand(len(b_enc)).clone()
    hook = checked_hook(config, place.folder)
    ours = config.get(OURS)
    ours = ours if isinstance(ours, dict) else {}
    said = identity_of(ours)
    return Parsed(
        tensors=read,
        architecture="topk" if kind == "AutoEncoderTopK" else "jumprelu",
        k=k_of(tensors, trainer) if kind == "AutoEncoderTopK" else None,
        hook=hook,
        group=said["group"],
        layer=said["layer"],
        fingerprint=said["fingerprint"],
        claims={"d_sae": integer(trainer, "dict_size"), "d_model": integer(trainer, "activation_dim")},
        meta={"dictionary_learning": dict(config)}
        | ({"model": trainer["lm_name"]} if trainer.get("lm_name") else {})
        | kept_meta({}, ours),
    )


def k_of(tensors: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> int | None:
    """k from the config and the state dict, which must agree."""
    k = integer(trainer, "k")
    if "k" in tensors:
        if tensors["k"].numel() != 1 or tensors["k"].dtype not in (int32, int64):
            raise FormatError("k in the weights file must be one whole number")
        inside = int(tensors["k"])
        if k is not None and k != inside:
            raise FormatError(f"the config says k={k}, but the weights file says k={inside}")
        return inside
    return k


def one_threshold(tensors: Mapping[str, Tensor], kind: str) -> Tensor:
    """The threshold of a batch-top-k dictionary, which is below zero until training sets it."""
    threshold = tensors.get("threshold")
    if threshold is None or threshold.numel() != 1:
        raise FormatError(f"a {kind} needs one number as its threshold, and the weights file has none")
    if float(threshold) < 0:
        raise FormatError(f"this {kind} was saved before training set its threshold ({float(threshold):g})")
    return threshold.reshape(1).float()


def write_dictionary(sae: SAE) -> Written:
    """The folder `load_dictionary` reads: AutoEncoderTopK with `b_enc` folded, or JumpReluAutoEncoder as it is."""
    layer = need_layer(sae)
    jump = isinstance(sae, JumpReLU)
    if jump:
        tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec.T, "b_dec": sae.b_dec}
        tensors["threshold"] = sae.threshold
    else:
        tensors = {
            "encoder.weight": sae.W_enc,
            "encoder.bias": weight_folding.with_b_dec(sae.W_enc, sae.b_enc, sae.b_dec),
            "decoder.weight": sae.W_dec,
            "b_dec": sae.b_dec,
            "k": tensor(sae.k).int(),
            "threshold": tensor(-1.0),
        }
    trainer = {
        "trainer_class": "JumpReluTrainer" if jump else "TopKTrainer",
        "dict_class": "JumpReluAutoEncoder" if jump else "AutoEncoderTopK",
        **({} if jump else {"k": sae.k}),
        "layer": layer,
        "lm_name": sae.meta.get("model"),
        "submodule_name": f"{hooks.of_sae(sae.hook_point, layer).stream}_layer_{layer}",
        "activation_dim": sae.d_model,
        "dict_size": sae.d_sae,
    }
    return Written(tensors, {"trainer": trainer, OURS: identity_metadata(sae)})


DICTIONARY_LEARNING = Layout(
    name="dictionary_learning",
    weights=re.compile(r"(?P<folder>(?:.*/)?)ae\.pt"),
    weights_name=lambda layer: "ae.pt",
    config_name="config.json",
    config_of=lambda match: ("config.json",),
    config_needed=True,
    shared=False,
    container="pt",
    hook_of=hook_of_dictionary,
    read=read_dictionary,
    write=write_dictionary,
    computes_as_stored=True,
    kinds=("topk", "jumprelu"),
)
