"""`load_sae`: any SAE this package can read, from a name, a folder or a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError, check_count

from .base import SAE
from .catalog import Group
from .formats import READABLE, Entry, Layout, Place, build, find_entries, hooks
from .formats.container import read_config
from .formats.hooks import layer_in
from .formats.layout import STORED_DTYPES, kept_meta
from .kinds import KINDS
from .source import Source, resolve
from .terms import tell_terms


def load_sae(
    source: str | Path | Group,
    layer: int | str | None = None,
    *,
    k: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    d_model: int | None = None,
) -> SAE:
    """One SAE. Its matrices stay memory-mapped on the CPU unless another device or type is asked for; those stored in
    int8 become bfloat16.

    Args:
        source: a group of the catalog by Hub id, name or alias (`"lab"` is the bundled one), another repository
            (`owner/name`), a folder, or one weights file. From the Hub only the config and one layer are fetched.
        layer: which layer, counting from 0: a number, a hook point such as `layers.12.resid_post`, or the name of
            the SAE's folder. Not needed where there is only one.
        k: active features per token, only for files that don't say.
        device: where the weights go.
        dtype: how the matrices are kept; None keeps the stored type. Arithmetic is fp32 either way.
        revision: branch, tag or commit on the Hub.
        cache_dir: where huggingface_hub keeps its files, if not in its usual place.
        d_model: refuse an SAE that reads residuals of another width.

    Raises:
        NotFoundError: no such source, file or layer, or the Hub can't be reached.
        FormatError: a file that is not what it should be.
        MismatchError: shapes that don't belong together, or another `d_model`.
        InputError: a layer or k that is needed or contradicted, a dtype that can't be stored.
    """
    if dtype is not None and dtype not in STORED_DTYPES:
        raise InputError(f"weights are kept as float32, bfloat16 or float16, not {dtype}")
    if k is not None:
        check_count("k", k)
    place = resolve(source, revision, cache_dir)
    entry = choose(place, entries_of(place), layer)
    sae = read_entry(place, entry, k)
    tell_terms(sae.identity.group)
    if d_model is not None and sae.d_model != d_model:
        raise MismatchError(f"{sae.identity} reads residuals of {sae.d_model} dimensions, but the model has {d_model}")
    return sae if dtype is None and torch.device(device).type == "cpu" else sae.to(device, dtype)


def layers_of(
    source: str | Path | Group, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> list[int]:
    """The layers a source has an SAE for, in order, without opening any weights.

    Raises:
        NotFoundError, FormatError: as `load_sae`.
    """
    place = resolve(source, revision, cache_dir)
    if place.listed is not None and place.listed.folder is None and place.listed.complete:
        return list(place.listed.layer_numbers)
    return sorted({entry.layer for entry in entries_of(place) if entry.layer is not None})


def entries_of(place: Source) -> list[Entry]:
    """The SAEs of a place; where neither file nor folder names say the layer, the config is asked."""
    if place.only is not None:
        return [_entry_of_file(place, place.only)]
    found = [_with_layer(place, entry) for entry in find_entries(place.names(), place.where)]
    if place.listed is not None and {e.layer for e in found} == {layer + 1 for layer in place.listed.layer_numbers}:
        # As many files as layers, numbered from 1: the output of the first layer is layer 0.
        found = [replace(entry, layer=entry.layer - 1) for entry in found if entry.layer is not None]
    return sorted(found, key=lambda e: (e.layer is None, e.layer or 0, e.weights))


def _with_layer(place: Source, entry: Entry) -> Entry:
    """The entry with its layer, which its config or the name of the whole place may know.

    A config is opened where the names of file and folder do not say both layer and stream: `resid_pre` of a layer is
    the output of the one before.
    """
    layout = READABLE[entry.layout]
    known = layout.shared or place.listed is not None or hooks.in_folder(entry.folder) is not None
    said = entry.layer is not None and known
    if said or (entry.config is None and entry.folder):
        return entry
    hook = layout.hook_of(read_config(place.fetch(entry.config))) if entry.config else None
    if entry.layer is not None:
        shifted = hook is not None and hook.before and hook.layer == entry.layer - 1
        return replace(entry, layer=hook.layer) if hook and shifted else entry
    layer = hook.layer if hook else None
    if entry.folder:
        return replace(entry, layer=layer)
    stated = hooks.about(place.label)
    if stated is None or stated.stream == "other" or stated.layer is None:
        return replace(entry, layer=layer_in(place.label) if layer is None else layer)
    if hook is not None and layer not in (None, stated.layer, stated.layer - hook.before):
        raise FormatError(f"{place.where} is named for layer {stated.layer}, but its config says layer {layer}")
    return replace(entry, layer=stated.layer if layer is None else layer)


def _entry_of_file(place: Source, name: str) -> Entry:
    """The SAE in one named file, with the config beside it; an unknown name is read as the official layout."""
    names = [name, *(n for n in place.names() if "/" not in n and n.endswith(".json"))]
    for layout in READABLE.values():
        if layout.weights.fullmatch(name) and (found := layout.entries(names)):
            return _with_layer(place, found[0])
    suffix = Path(name).suffix
    if suffix not in (".pt", ".safetensors"):
        raise InputError(f"{place.where} is neither a folder nor a .pt or .safetensors file")
    config = "config.json" if "config.json" in names else None
    return Entry("official" if suffix == ".pt" else "safetensors", name, config, layer_in(name))


def choose(place: Source, entries: Sequence[Entry], layer: int | str | None) -> Entry:
    """The one entry that `layer` means.

    Raises:
        InputError: it names none or several of them.   NotFoundError: there is no such layer.
    """
    if not isinstance(layer, str) and layer is not None:
        layer = number(layer)
    if isinstance(layer, str):
        for entry in entries:
            if layer.strip("/") in {entry.folder, entry.weights} - {""}:
                return entry
    if layer is None:
        if len(entries) == 1:
            return entries[0]
        raise InputError(f"{place.where} has SAEs for several layers, choose one with layer=: {listing(entries)}")
    wanted = parse_layer(layer)
    same = [entry for entry in entries if entry.layer == wanted]
    if not same:
        if len(entries) == 1 and entries[0].layer is None:
            return replace(entries[0], layer=wanted)
        raise NotFoundError(f"{place.where} has no SAE for layer {wanted}; it has {listing(entries)}")
    if len(same) > 1:
        shared = READABLE[same[0].layout].shared
        folders = ", ".join(repr(entry.weights if shared else entry.folder or entry.weights) for entry in same)
        raise InputError(f"{place.where} has several SAEs for layer {wanted}, name one as layer=: {folders}")
    return same[0]


def listing(entries: Sequence[Entry]) -> str:
    """The layers of the entries as a phrase, runs shortened: `layers 0 to 27`."""
    layers = sorted({entry.layer for entry in entries if entry.layer is not None})
    if not layers:
        return ", ".join(entry.folder or entry.weights for entry in entries)
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def number(layer: int) -> int:
    """The layer if it is a whole number from 0 up, else InputError."""
    if isinstance(layer, bool) or layer < 0:
        raise InputError(f"a layer must be a whole number of at least 0; got {layer!r}")
    return layer


def parse_layer(layer: int | str) -> int:
    """The layer a number or a hook point such as `layers.12.resid_post` means; raises InputError for anything else."""
    if isinstance(layer, int):
        return number(layer)
    name = layer.strip()
    hook = hooks.about(name)
    if match := re.fullmatch(r"(?:layer_?)?([0-9]{1,9})", name):
        return int(match[1])
    if hook is None or hook.layer is None or hook.before or hook.stream != "resid_post":
        raise InputError(f"{layer!r} is not the output of a layer; write it as 12, 'layer12' or 'layers.12.resid_post'")
    return hook.layer


def read_entry(place: Source, entry: Entry, k: int | None) -> SAE:
    """Fetch and read one SAE."""
    layout: Layout = READABLE[entry.layout]
    config_file = place.fetch_optional(entry.config) if entry.config else None
    tensors, metadata = layout.open_file(place.fetch(entry.weights))
    folder = entry.folder or place.label
    config = read_config(config_file)
    parsed = layout.read(tensors, config, metadata, Place(entry.layer, folder))
    parsed = replace(parsed, meta={**kept_meta(config, metadata), **parsed.meta})
    if place.listed and KINDS[parsed.architecture].fixed_k and parsed.k is None and k is None:
        k = place.listed.k
    sae = build(parsed, group=place.group, layer=entry.layer, k=k, names=[*folder.split("/")[::-1], place.group])
    if place.listed:
        check_listed(sae, place.listed, f"{place.where} should hold", f"layer {entry.layer}")
    return sae


def check_listed(sae: SAE, listed: Group, should: str, what: str) -> None:
    """Raise MismatchError if an SAE is not of the size or k that the catalog says its group has."""
    d_sae = listed.d_sae or sae.d_sae
    if (sae.d_sae, sae.d_model) != (d_sae, listed.d_model):
        raise MismatchError(
            f"{should} SAEs of {d_sae} x {listed.d_model} according to the catalog, but {what} is"
            f" {sae.d_sae} x {sae.d_model}"
        )
    if sae.k is not None and sae.k != listed.k:
        raise MismatchError(f"{should} SAEs of k={listed.k} according to the catalog, but {what} says k={sae.k}")
