"""Scopes of tiny random models of every family with random SAEs at the first, a middle and the last layer."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from byte_tokenizer import byte_tokenizer
from families import D_MODEL, N_LAYERS, build
from tiny import random_sae

from qwen_scope import load_scope
from qwen_scope.sae import save_sae
from qwen_scope.scope import Scope
from qwen_scope.text import Counted

LAYERS = (0, 1, N_LAYERS - 1)
IDS = (17, 201, 33, 4, 99, 120, 8, 61, 140, 77)


@functools.cache
def scope_of(family: str, double: bool = True) -> Scope:
    model = build(family).requires_grad_(False)
    if double:
        model = model.double()
        model.set_experts_implementation("eager")  # the grouped kernel takes no float64
    folder = Path(tempfile.mkdtemp(prefix="qwen-scope-sibling-"))
    for layer in LAYERS:
        save_sae(random_sae(layer, D_MODEL), folder)
    return load_scope(model, str(folder), tokenizer=byte_tokenizer(), counted=Counted())
