"""The layouts by name, and the finding of SAEs among file names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_scope.errors import FormatError, InputError, nearest

from .dictionary_learning import hook_of_dictionary, read_dictionary, write_dictionary
from .layout import Entry, Layout
from .official import read_official, write_official
from .sae_lens import hook_of_sae_lens, read_sae_lens, write_sae_lens
from .sparsify import hook_of_sparsify, read_sparsify, write_sparsify

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
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
        ),
        Layout(
            name="safetensors",
            weights=re.compile(r"(?P<folder>)layer(?P<layer>[0-9]+)\.sae\.safetensors"),
            weights_name=lambda layer: f"layer{layer}.sae.safetensors",
            config_name="config.json",
            config_of=lambda match: ("config.json",),
            config_needed=False,
            shared=True,
            container="safetensors",
            hook_of=lambda config: None,
            read=read_official,
            write=write_official,
        ),
        Layout(
            name="sae_lens",
            # OpenInterpretability keeps all layers in one folder: sae_L11_latest.safetensors, sae_L11_cfg.json.
            weights=re.compile(r"(?P<folder>(?:.*/)?)(?:sae_weights|sae_L(?P<layer>[0-9]+)(?:_latest)?)\.safetensors"),
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
        ),
        Layout(
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
        ),
        Layout(
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
        ),
    )
}


def layout_named(name: str) -> Layout:
    """The layout of that name; raises InputError with the nearest names."""
    if name not in LAYOUTS:
        raise InputError(f"there is no layout {name!r}; {nearest(name, LAYOUTS)}")
    return LAYOUTS[name]


def find_entries(names: Sequence[str], where: str) -> list[Entry]:
    """The SAEs among the file `names` of `where`, by layer; they must all be of one layout.

    Raises:
        FormatError: the files are of no known layout, or of several.
    """
    names = sorted(names)
    found = {name: entries for name, layout in LAYOUTS.items() if (entries := layout.entries(names))}
    if len(found) > 1:
        examples = " and ".join(f"{name} ({entries[0].weights})" for name, entries in found.items())
        raise FormatError(f"{where} holds SAEs in several layouts, {examples}; name one file, or part them")
    if not found:
        raise FormatError(f"{where} holds no SAE in a known layout ({', '.join(LAYOUTS)}); {missing(names)}")
    (entries,) = found.values()
    return sorted(entries, key=lambda e: (e.layer is None, e.layer or 0, e.weights))


def missing(names: Sequence[str]) -> str:
    """What stands in the way: weights without the config they need, or what there is instead."""
    for name in names:
        for layout in LAYOUTS.values():
            if match := layout.weights.fullmatch(name):
                return f"{name} needs {' or '.join(layout.config_of(match))} beside it"
    return "it holds " + (", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing")
