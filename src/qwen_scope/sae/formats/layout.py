"""What every layout answers in, and the checks each SAE passes before anyone may use it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qwen_scope.errors import FormatError, InputError, MismatchError, QwenScopeWarning, brief
from qwen_scope.files import parse_value

from ..base import SAE, Identity, check_weights, fingerprint
from ..kinds import KINDS
from .container import read_weights
from .hooks import Hook, in_folder, layer_in

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MATRICES = ("W_enc", "W_dec")


@dataclass(frozen=True)
class Parsed:
    """What the files of one SAE say, in this package's orientation; None where they don't say.

    Attributes:
        tensors: `W_enc (d_sae, d_model)`, `W_dec (d_model, d_sae)`, `b_enc`, `b_dec` and what the architecture calls
            its `own`, such as `threshold`, so that `pre = x @ W_enc.T + b_enc` on the raw residual.
        architecture: one of `KINDS`.
        claims: sizes the config states, such as `{"d_sae": 32768}`, to be compared with the tensors.
    """

    tensors: Mapping[str, Tensor]
    architecture: str
    k: int | None = None
    hook: Hook | None = None
    group: str | None = None
    layer: int | None = None
    fingerprint: str | None = None
    claims: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What a layout stores for one SAE: its tensors, the config beside them, and metadata inside the weights file."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One SAE among the files of a folder or a repository; names are relative to it."""

    layout: str
    weights: str
    config: str | None
    layer: int | None

    @property
    def folder(self) -> str:
        """The folder of the weights, `""` for the top."""
        return self.weights.rpartition("/")[0]


@dataclass(frozen=True)
class Place:
    """What the place of an SAE says about it: its layer, and the name of its folder."""

    layer: int | None
    folder: str = ""


@dataclass(frozen=True)
class Layout:
    """One way of storing SAEs.

    Attributes:
        weights: regular expression of the weights' file name, with the folder as group `folder` and, where the name
            holds the layer, group `layer`.
        weights_name: the file name for a layer, as this layout is written.
        config_name: the file beside the weights that describes them, as this layout is written.
        config_of: the names such a file may have, for the match of a weights file.
        config_needed: whether the layout can't be read without that file.
        shared: one config describes all layers of a folder; otherwise every SAE has a folder of its own.
        container: the kind of weights file.
        computes_as_stored: whether the tool that reads it computes in the type the matrices are stored in, so that a
            smaller type changes its features; such a layout is written in fp32 unless another type is asked for.
        hook_of: the hook point that a config mentions, for folders whose name does not say it.
        kinds: the architectures it can hold; None where it names each by `SAE.architecture` and keeps its own tensors.
        eight_bits: whether it can keep matrices in 8 bits.
        read: tensors, config, metadata and what the place says in, `Parsed` out.
        write: an SAE in, `Written` out; None for a layout that is only read.
        open_file: a weights file in, its tensors and metadata out.
    """

    name: str
    weights: re.Pattern[str]
    weights_name: Callable[[int | None], str]
    config_name: str
    config_of: Callable[[re.Match[str]], Sequence[str]]
    config_needed: bool
    shared: bool
    container: Literal["pt", "safetensors"]
    hook_of: Callable[[Mapping[str, Any]], Hook | None]
    read: Callable[[Mapping[str, Tensor], Mapping[str, Any], Mapping[str, str], Place], Parsed]
    write: Callable[[SAE], Written] | None = None
    computes_as_stored: bool = False
    kinds: tuple[str, ...] | None = None
    eight_bits: bool = False
    open_file: Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]] = read_weights

    def check_kind(self, sae: SAE) -> None:
        """Raise InputError if the layout has no way of saying what this SAE computes."""
        if self.kinds is not None and sae.architecture not in self.kinds:
            raise InputError(
                f"the {self.name} layout can only hold {' and '.join(self.kinds)} SAEs, not {sae.architecture}"
            )

    def entries(self, names: Sequence[str]) -> list[Entry]:
        """The SAEs of this layout among the file `names`."""
        found = []
        for name in names:
            match = self.weights.fullmatch(name)
            if not match:
                continue
            folder = match["folder"] or ""
            beside = [config for config in map(folder.__add__, self.config_of(match)) if config in names]
            if self.config_needed and not beside:
                continue
            config = beside[0] if beside else None
            said = match.groupdict().get("layer")
            stated = in_folder(folder)
            layer = int(said) if said else stated.layer if stated else layer_in(folder)
            found.append(Entry(self.name, name, config, layer))
        return found


KEPT = ("counted", "held_out", "history", "base", "rounded")
"""Parts of an SAE's `meta` that its files carry: which tokens counted in training, what was kept out of it, by hook
point what it was trained on and began as, the fingerprint of the model's weights, and by hook point that of the SAE it
was rounded from."""


def identity_metadata(sae: SAE) -> dict[str, str]:
    """What a file with room for strings says about the SAE in it, in every layout alike."""
    said = {
        "architecture": sae.architecture,
        "k": sae.k,
        "hook_point": sae.hook_point,
        "group": sae.identity.group,
        "layer": sae.identity.layer,
        "fingerprint": sae.identity.fingerprint,
    }
    kept = {key: json.dumps(sae.meta[key]) for key in KEPT if key in sae.meta}
    return {key: str(value) for key, value in said.items() if value is not None} | kept


def kept_meta(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Of what files say, the parts of an SAE's `meta` that every layout keeps: objects of a config of ours, or as
    `identity_metadata` wrote them.

    Raises:
        FormatError: one of them is no JSON object.
    """
    found: dict[str, Any] = {}
    for key in KEPT:
        if key in metadata:
            found[key] = parse_value(str(metadata[key]), f"{key!r} beside the weights")
        elif key in config:
            found[key] = config[key]
        else:
            continue
        if not isinstance(found[key], dict):
            raise FormatError(f"{key!r} in the SAE's files is an object with keys, not {brief(found[key])}")
    return found


def identity_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Group, layer and fingerprint from what `identity_metadata` wrote, as arguments of `Parsed`."""
    return {
        "group": text(metadata, "group"),
        "layer": inside(metadata, "layer"),
        "fingerprint": text(metadata, "fingerprint"),
    }


def inside(metadata: Mapping[str, Any], key: str) -> int | None:
    """A whole number that `identity_metadata` wrote as a string; raises FormatError for anything else."""
    value = metadata.get(key)
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", str(value)):
        raise FormatError(f"{key!r} beside the weights must be a whole number; got {brief(value)}")
    return int(value)


def need_keys(tensors: Mapping[str, Tensor], needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raise FormatError unless the file holds the `needed` tensors and nothing but these and the `optional` ones."""
    missing = sorted(set(needed) - set(tensors))
    extra = sorted(set(tensors) - set(needed) - set(optional))
    said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has the unknown {', '.join(extra)}"] * bool(extra)
    if said:
        raise FormatError(f"the weights file {' and '.join(said)}; it must hold exactly {', '.join(needed)}")


def integer(config: Mapping[str, Any], key: str) -> int | None:
    """A whole positive number of the config, None where it is not given; raises FormatError for anything else."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(f"{key!r} in the config must be a positive whole number; got {brief(value)}")
    return value


def text(config: Mapping[str, Any], key: str) -> str | None:
    """A string of the config, None where it is not given; raises FormatError for anything else."""
    value = config.get(key)
    if value is None or isinstance(value, str):
        return value
    raise FormatError(f"{key!r} in the config must be a string, not {brief(value)}")


def check_tensors(tensors: Mapping[str, Tensor], kind: type[SAE]) -> None:
    """Raise FormatError on a stored type that is not fp32, bf16 or fp16, on a vector that is not finite, or on a value
    that the architecture can't have, such as a threshold below zero."""
    for name, tensor in tensors.items():
        if tensor.dtype not in STORED_DTYPES:
            raise FormatError(f"{name} is stored as {tensor.dtype}; only float32, bfloat16 and float16 are read")
        if name not in MATRICES and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).flatten().nonzero()[0])
            raise FormatError(f"{name} holds NaN or infinity, first at position {bad}")
    if (problem := kind.problem(tensors)) is not None:
        raise FormatError(problem)
    if tensors["W_enc"].dtype != tensors["W_dec"].dtype:
        raise FormatError(f"W_enc is stored as {tensors['W_enc'].dtype} and W_dec as {tensors['W_dec'].dtype}")


def choose_k(given: int | None, parsed: Parsed, names: Sequence[str]) -> int:
    """k from the config, else from `L0_...` in one of the names, else as given; never a guess.

    Raises:
        InputError: it is nowhere to be found, or what was given contradicts the files.
    """
    said, where = parsed.k, "its config"
    if said is None and (named := k_in_name(names)):
        said, where = named[0], f"its name {named[1]!r}"
    if said is None and given is None:
        raise InputError("neither the config nor the name says how many features are active per token; pass k=")
    if said is not None and given is not None and said != given:
        raise InputError(f"k={given} was asked for, but this SAE was trained with k={said} according to {where}")
    return said if said is not None else given  # type: ignore[return-value]


def k_in_name(names: Sequence[str]) -> tuple[int, str] | None:
    """The k that the first of the names with an `L0_...` says, and that name."""
    for name in names:
        if match := re.search(r"L0_([0-9]{1,9})(?![0-9])", name):
            return int(match[1]), name
    return None


def build(parsed: Parsed, *, group: str, layer: int | None, k: int | None, names: Sequence[str] = ()) -> SAE:
    """The checked SAE; `group` and `layer` are what its place says, `names` may hold its k.

    A name that says another k than the config is told in a `QwenScopeWarning`; the config's is used.

    Raises:
        FormatError: types, finiteness, or a file that contradicts its config or its name.
        MismatchError: shapes that do not make one SAE.
        InputError: k is missing or contradicted.
    """
    if parsed.layer is not None and layer is not None and parsed.layer != layer:
        raise FormatError(f"the file's name says layer {layer}, but it describes itself as layer {parsed.layer}")
    layer = parsed.layer if layer is None else layer
    hook = parsed.hook
    if hook is not None and None not in (hook.layer, layer) and hook.layer != layer:
        raise FormatError(f"the SAE contradicts itself: it is of layer {layer}, and it says that it reads {hook}")
    layer = hook.layer if layer is None and hook else layer
    kind: Any = KINDS[parsed.architecture]
    if missing := sorted(set(kind.own) - set(parsed.tensors)):
        raise FormatError(
            f"a {kind.architecture} SAE needs the tensor {', '.join(missing)}, and the weights file has none"
        )
    check_tensors(parsed.tensors, kind)
    tensors = {name: t if name in MATRICES else t.float() for name, t in parsed.tensors.items()}
    check_weights(tensors["W_enc"], tensors["W_dec"], tensors["b_enc"], tensors["b_dec"])
    d_sae, d_model = tensors["W_enc"].shape
    for name, claim in parsed.claims.items():
        real = {"d_sae": d_sae, "d_model": d_model}[name]
        if claim is not None and claim != real:
            raise MismatchError(f"the config says {name} {claim}, but the weights have {name} {real}")
    identity = Identity(parsed.group or group, layer, parsed.fingerprint or fingerprint(**tensors))
    hook_point = None
    if hook is not None and (layer is not None or hook.stream != "resid_post"):
        hook_point = hook.stream if layer is None else f"layers.{layer}.{hook.stream}"
    shared = {"hook_point": hook_point, "identity": identity, "meta": dict(parsed.meta)}
    if not kind.fixed_k:
        if k is not None:
            has = f"has a {' and a '.join(kind.own)} per feature and no k" if kind.own else "has no k"
            raise InputError(f"k={k} was asked for, but a {kind.architecture} SAE {has}")
        return kind(**tensors, **shared)
    sae = kind(**tensors, k=choose_k(k, parsed, names), **shared)
    if parsed.k is not None and (named := k_in_name(names)) and named[0] != sae.k:
        said = f"the name {named[1]!r} says k={named[0]}, but the SAE's own config says k={sae.k}, which is used"
        warnings.warn(said, QwenScopeWarning, stacklevel=2)
    return sae


def need_layer(sae: SAE) -> int:
    """The layer of an SAE that is to be stored; raises InputError if it has none."""
    if sae.identity.layer is None:
        raise InputError("this SAE does not know its layer, so no file name can say it; give it an identity with one")
    return sae.identity.layer


def refuse(config: Mapping[str, Any], allowed: Mapping[str, tuple], what: str) -> None:
    """Raise FormatError for an option of the config that changes the arithmetic and is not an `allowed` value."""
    for key, values in allowed.items():
        if config.get(key) not in (None, *values):
            raise FormatError(f"{what} with {key}={config[key]!r} can't be read: its arithmetic can't be folded away")


def known_kind(name: str, what: str, kinds: Sequence[str] | None = None) -> type[SAE]:
    """The class of an architecture, which must be one of `kinds` (by default all of `KINDS`); else FormatError."""
    known = tuple(KINDS) if kinds is None else kinds
    if name not in known:
        raise FormatError(f"{what} of architecture {name!r} can't be read; {' and '.join(known)} can")
    return KINDS[name]
