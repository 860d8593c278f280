"""The bundled model with its SAEs, on one thread of the CPU, so that figures do not depend on the number of cores."""

from __future__ import annotations

from functools import cache

import torch

from qwen_scope import Scope, load_scope


@cache
def lab() -> Scope:
    """The lab."""
    torch.set_num_threads(1)
    return load_scope("lab", device="cpu")
