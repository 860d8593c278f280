"""How a scope is opened."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.model import d_model, live_model, load_model
from qwen_scope.text import Counted

from .saes import CACHE_BYTES, SAEs
from .scope import Scope
from .sources import resolve

SAE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_scope(
    model: str | os.PathLike[str] | nn.Module | Any = "lab",
    sae: str | os.PathLike[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    sae_dtype: str | None = None,
    k: int | None = None,
    device_map: str | None = None,
    quantization: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    counted: Counted | None = None,
    sliced: bool = False,
) -> Scope:
    """Open a language model and its SAEs.

    Args:
        model: `lab` for the bundled one, a hub id, a folder (also of a PEFT adapter), a GGUF, or a model of
            transformers, PEFT, TransformerLens (a bridge) or nnsight that is in memory; it stays where and as it is.
        sae: a group (hub id, catalog alias or folder); it may be left out where the catalog knows exactly one.
        tokenizer: of a model in memory; a bridge and a model of nnsight have their own.
        adapter: a folder with a PEFT adapter to be merged into the model.
        device: where the model runs, and the SAEs; by default CUDA, else MPS, else the CPU.
        dtype: of the model's weights: `auto`, `float32`, `bfloat16` or `float16`.
        sae_dtype: of the SAEs' weights in memory; by default as stored. Their arithmetic is fp32 either way.
        k: only for SAEs whose files do not say it.
        device_map, quantization: as in `load_model`.
        cache_bytes: how much memory the SAEs may take before the least recently used leave.
        sliced: cut each SAE by width among the processes that `torchrun` started. All of them ask the scope the same
            questions in the same order and get the answers of one process; for reading (`features`, `extract`), not
            for steering.
        counted: which tokens count, `Counted.everything()` for all; by default as the SAEs' files say, else measured.

    Raises:
        NotFoundError, FormatError: the model or the SAEs do not exist or are not what they should be.
        MismatchError: they do not belong together.
    """
    if sae_dtype is not None and sae_dtype not in SAE_DTYPES:
        raise InputError(f"the type of SAE weights is one of {', '.join(SAE_DTYPES)}, not {sae_dtype!r}")
    wanted = None if sae is None else os.fspath(sae)
    if isinstance(model, str | os.PathLike):
        source, group = resolve(os.fspath(model), wanted)
        placed: dict[str, Any] = {"device_map": device_map, "quantization": quantization, "adapter": adapter}
        loaded = load_model(source, device=device, dtype=dtype, **placed)
    else:
        if (device, dtype, device_map, quantization, adapter) != (None, "auto", None, None, None):
            raise InputError("device, dtype, device_map, quantization and adapter are settled in a model in memory")
        loaded = live_model(model, tokenizer)
        group = resolve(loaded.name, wanted)[1]
    where = loaded.model.device if device_map is None else torch.device(device or "cpu")
    saes = SAEs(
        group,
        d_model=d_model(loaded.model),
        k=k,
        device=where,
        dtype=SAE_DTYPES[sae_dtype] if sae_dtype else None,
        cache_bytes=cache_bytes,
        sliced=sliced,
    )
    return Scope(loaded, saes, counted)
