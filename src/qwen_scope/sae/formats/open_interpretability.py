"""OpenInterpretability's folders, only read: `sae_L11_latest.safetensors`, often with `sae_L11_cfg.json` beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .layout import Layout, Parsed, Place
from .sae_lens import hook_of_sae_lens, read_sae_lens


def read_open_interpretability(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], metadata: Mapping[str, str], place: Place
) -> Parsed:
    """sae_lens tensors of a top-k SAE that reads `x - b_dec`; what the config leaves out is what the release does.

    The file's name says the layer, whose output is read. Without a config k is the catalog's, or is given.
    """
    said = {"architecture": "topk", "hook_name": f"model.layers.{place.layer}", **config}
    return read_sae_lens(tensors, said, metadata, place)


OPEN_INTERPRETABILITY = Layout(
    name="open_interpretability",
    weights=re.compile(r"(?P<folder>(?:.*/)?)sae_L(?P<layer>[0-9]+)_latest\.safetensors"),
    weights_name=lambda layer: f"sae_L{layer}_latest.safetensors",
    config_name="sae_cfg.json",
    config_of=lambda match: (f"sae_L{match['layer']}_cfg.json",),
    config_needed=False,
    shared=True,
    container="safetensors",
    hook_of=hook_of_sae_lens,
    read=read_open_interpretability,
    kinds=("topk", "jumprelu"),
)
