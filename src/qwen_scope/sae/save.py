"""`save_sae`: any SAE in any layout, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen_scope.errors import FormatError, InputError, MismatchError, reason
from qwen_scope.files import write_whole

from .base import SAE
from .formats import LAYOUTS, READABLE, Layout, Written, find_entries, layout_named
from .formats.container import read_config, write_weights
from .formats.eight_bits import ROUNDED, in_eight_bits, packed
from .formats.hooks import module_name, of_sae
from .formats.layout import KEPT, STORED_DTYPES, need_layer
from .load import load_sae
from .terms import USAGE, terms_of


@dataclass(frozen=True)
class _Job:
    """One SAE on its way to disk."""

    folder: Path
    weights: str
    written: Written


def save_sae(
    sae: SAE | Sequence[SAE], folder: str | Path, layout: str = "official", dtype: torch.dtype | None = None
) -> Path:
    """Store one SAE or several layers of one group in `folder`; returns the folder.

    Every file is written under a temporary name beside its place and moved there once all are whole, configs last,
    so an interrupted save leaves nothing half-written. A folder that already holds other layers of the same group in
    the same layout gets the new ones added. Layouts that keep one SAE per folder use the folder itself for a single
    SAE and a subfolder per layer for several.

    Args:
        layout: one of `LAYOUTS`.
        dtype: how the matrices are stored, fp32, bf16, fp16 or, in the layout `safetensors`, int8 with a scale per
            feature: that is another SAE, with its own fingerprint, and is opened in bf16. None keeps their type in our
            own layouts (`official`, `safetensors`), and means fp32 in those of tools that compute in the stored type
            (`sae_lens`, `sparsify`, `dictionary_learning`): there a smaller type changes the features. Vectors stay
            fp32.

    Raises:
        InputError: no SAE, an unknown layout or dtype, an SAE without a layer or with weights that are not finite (also
            after the change of type), or a disk that refuses.
        MismatchError: SAEs of several groups, or a folder that holds another group or another SAE of that layer.
        FormatError: a folder that holds SAEs in another layout, or a broken file in the place of a new one.
    """
    saes = [sae] if isinstance(sae, SAE) else list(sae)
    chosen = layout_named(layout)
    assert chosen.write is not None, "a layout that can be named is one that is written"
    if not saes:
        raise InputError("there is no SAE to save")
    if dtype is not None and dtype not in (*STORED_DTYPES, torch.int8):
        raise InputError(f"weights are stored as float32, bfloat16, float16 or int8, not {dtype}")
    if dtype is torch.int8 and not chosen.eight_bits:
        able = " and ".join(name for name, one in LAYOUTS.items() if one.eight_bits)
        raise InputError(f"weights in int8 are stored in the layout {able} alone, not in {layout}")
    dtype = dtype or (torch.float32 if chosen.computes_as_stored else None)
    layers = [need_layer(one) for one in saes]
    for one in saes:
        chosen.check_kind(one)
    if len(set(layers)) < len(layers):
        raise InputError(f"several of the SAEs are for the same layer: {', '.join(map(str, sorted(layers)))}")
    if len(groups := {one.identity.group for one in saes}) > 1:
        raise MismatchError(f"one folder holds one group of SAEs, not {', '.join(sorted(groups))}")
    folder = Path(folder)
    check_free(folder, chosen)
    spread = not chosen.shared and (len(saes) > 1 or holds_subfolders(folder, chosen))
    jobs = []
    for one, layer in zip(saes, layers, strict=True):
        at = folder / folder_name(one) if spread else folder
        stored = in_eight_bits(one) if dtype is torch.int8 else one.to(dtype=dtype)
        check_same(at / chosen.weights_name(layer), stored)
        for name in ("W_enc", "W_dec"):
            stored.check_finite(name)
        written = chosen.write(stored)
        if dtype is torch.int8:
            written = replace(written, tensors=packed(written.tensors))
        jobs.append(_Job(at, chosen.weights_name(layer), written))
    configs, terms = {}, terms_of(saes[0].identity.group)
    for job in jobs:
        path = job.folder / chosen.config_name
        configs[path] = merged(configs.get(path) or _existing(path), job.written.config, job.folder)
    _store(jobs, configs, chosen, terms)
    return folder


def folder_name(sae: SAE) -> str:
    """The folder of an SAE among others, in layouts that keep one per folder: the module whose output it reads, such
    as `layers.4` or `layers.4.mlp`, as sparsify names them.

    Raises:
        InputError: the SAE has no layer.
    """
    return module_name(of_sae(sae.hook_point, need_layer(sae)))


def check_free(folder: Path, layout: Layout) -> None:
    """Raise FormatError if `folder` holds SAEs in another layout, InputError if it is no folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder")
    names = [p.relative_to(folder).as_posix() for pattern in ("*", "*/*") for p in folder.glob(pattern)]
    others = [name for name, other in READABLE.items() if name != layout.name and other.entries(names)]
    if others:
        raise FormatError(f"{folder} already holds SAEs in the layout {others[0]}; choose another folder")


def check_same(path: Path, sae: SAE) -> None:
    """Raise MismatchError if a weights file is there already and holds another SAE; the same one may be replaced."""
    if path.exists() and load_sae(path, k=sae.k).identity.fingerprint != sae.identity.fingerprint:
        raise MismatchError(
            f"{path.parent} already holds another SAE for layer {sae.identity.layer}, choose another folder"
        )


def holds_subfolders(folder: Path, layout: Layout) -> bool:
    """Whether the folder holds SAEs of this layout in folders below it."""
    names = [p.relative_to(folder).as_posix() for p in folder.glob("*/*")]
    return bool(layout.entries(names)) and bool(find_entries(names, str(folder)))


def merged(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config of a folder with one more layer; raises MismatchError where the two contradict each other."""
    if not old:
        return dict(new)
    kept = {key: _joined(key, old.get(key), new, folder) for key in KEPT if key in old or key in new}
    for key, value in new.items():
        if key == "fingerprints" or key in KEPT:
            continue
        if key in old and old[key] != value:
            raise MismatchError(f"{folder} holds SAEs with {key} {old[key]!r}, and this one has {value!r}")
    both = dict(old.get("fingerprints") or {})
    for layer, fingerprint in (new.get("fingerprints") or {}).items():
        if both.setdefault(layer, fingerprint) != fingerprint:
            raise MismatchError(f"{folder} already holds another SAE for layer {layer}; choose another folder")
    ordered = dict(sorted(both.items(), key=lambda item: int(item[0])))
    found = {**old, **new, **kept, **({"fingerprints": ordered} if both else {})}
    return {key: value for key, value in found.items() if key not in KEPT or value is not None}


def _joined(key: str, old: Any, config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """What a folder says of all its SAEs once there is one more: each one's own threshold for sinks and history, and
    else nothing where they differ; raises MismatchError where they were trained on other tokens."""
    new = config.get(key)
    if old == new:
        return new
    if key == ROUNDED:
        return {**(old or {}), **(new or {})}
    if not isinstance(old, dict) or not isinstance(new, dict) or key not in ("counted", "history"):
        return None
    if key == "history":
        return {**old, **new}
    if differ := [name for name in ("first", "special", "phases") if old.get(name) != new.get(name)]:
        raise MismatchError(
            f"{folder} holds SAEs that were trained on other tokens ({', '.join(differ)} of 'counted' differ); choose"
            " another folder"
        )
    names = [f"layers.{layer}.{config['hook_point']}" for layer in config["fingerprints"]]
    own = {name: new["norms"][name] for name in names if name in new["norms"]}
    return {**new, "norms": {**new["norms"], **old["norms"], **own}}


def _existing(path: Path) -> dict[str, Any]:
    return read_config(path) if path.is_file() else {}


def _store(
    jobs: Sequence[_Job], configs: Mapping[Path, Mapping[str, Any]], layout: Layout, terms: str | None = None
) -> None:
    """Write everything beside its place, then move it there, configs last; what the owner asks of users with it."""
    try:
        with ExitStack() as stack:
            # They are renamed in the opposite order.
            targets = [*configs, *(job.folder / job.weights for job in reversed(jobs))]
            parts = {path: stack.enter_context(write_whole(path)) for path in targets}
            for path in {job.folder / USAGE for job in jobs} if terms is not None else ():
                sentence = f"{str(terms)[:1].upper()}{str(terms)[1:]}."
                stack.enter_context(write_whole(path)).write_text(f"{sentence}\n", encoding="utf-8")
            for job in jobs:
                where = parts[job.folder / job.weights]
                write_weights(where, layout.container, job.written.tensors, job.written.metadata)
            for path, config in configs.items():
                parts[path].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (InputError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, InputError) and error.__cause__ else error
        raise InputError(f"the SAE could not be written to {jobs[0].folder}: {reason(cause)}") from error
