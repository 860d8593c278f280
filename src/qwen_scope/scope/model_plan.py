"""What a language model takes without SAEs, from its config and the sizes of its files, and what a machine has."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_scope.errors import foreign
from qwen_scope.model import Gguf, ModelSizes, base_of, default_device, gguf_file, is_adapter, model_sizes, quantised

from .plan import TOKENS, config_of

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may have."""


@dataclass(frozen=True)
class ModelPlan:
    """Bytes, for one language model; nothing of its weights is read.

    Attributes:
        sizes: of its parts.
        disk: its files of weights, with those of an adapter.
        model: weights in the type that was asked for, which quantised files are unpacked to.
        packed: weights as they lie in memory where they can stay quantised, or None.
        weights: what they take as the model is loaded: packed unless a type was asked for.
        working: one batch at work, an estimate.
        context: tokens of the longest text, or None where the config sets no limit.
        cache: keys and values of a text of that length, or of a batch where there is no limit: a long text is read with
            them.
        vocabulary: tokens that it knows.
        base: the model that an adapter is put on, or None.
        quantised: how the weights in a folder are quantised, in a word, or None.
    """

    sizes: ModelSizes
    disk: int
    model: int
    packed: int | None
    weights: int
    working: int
    context: int | None
    cache: int
    vocabulary: int
    base: str | None
    quantised: str | None

    @property
    def total(self) -> int:
        """With one batch at work."""
        return self.weights + self.working


def plan_model(folder: Path, *, dtype: str | None = None) -> ModelPlan:
    """The plan for a folder with a model, of any quantisation, or with an adapter, or for a GGUF file.

    Args:
        dtype: of the weights; None for bfloat16, or packed as they are where they can stay so.

    Raises:
        FormatError: a config that transformers can't read.   InputError: a quantisation that is not read.
        NotFoundError: the base of an adapter is not here, or a package that a quantisation needs.
    """
    keep, dtype = dtype is None, dtype or "bfloat16"
    base = base_of(folder) if is_adapter(folder) else None
    place = folder if base is None else Path(base)
    file = gguf_file(str(place))
    gguf = None if file is None else Gguf.open(file)
    config = config_of(str(folder)) if gguf is None else gguf.config()
    sizes = model_sizes(config)
    disk = weight_files(place) if gguf is None else gguf.path.stat().st_size
    found = None if gguf is not None else quantised(str(place), config)
    stays = gguf.packed_bytes if gguf is not None and gguf.stays_packed and base is None else None
    weights = sizes.weight_bytes(dtype)
    if found is not None and not found.unpacked:
        stays = disk
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return ModelPlan(
        sizes=sizes,
        disk=disk + (0 if base is None else weight_files(folder)),
        model=weights,
        weights=weights if stays is None or (gguf is not None and not keep) else stays,
        packed=stays,
        working=sizes.capture_bytes(1, TOKENS, 1, dtype),
        context=context,
        cache=sizes.cache_bytes(1, context or TOKENS, dtype),
        vocabulary=config.get_text_config(decoder=True).vocab_size,
        base=base,
        quantised=None if found is None else str(found),
    )


def weight_files(folder: Path) -> int:
    """Bytes of the files of weights in a folder; 0 where it is not here."""
    return sum(path.stat().st_size for ending in ("*.safetensors", "*.bin") for path in folder.glob(ending))


def is_model(folder: Path) -> bool:
    """Whether there is a language model: a folder whose config names a `model_type`, a GGUF, or an adapter."""
    if gguf_file(str(folder)) is not None or is_adapter(folder):
        return True
    path = folder / "config.json"
    if not path.is_file():
        return False
    with foreign(f"{path} is not JSON"):
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))


def machine() -> tuple[str, int]:
    """The device that is used by default, and the bytes that it has: of the CPU what this process may have."""
    device = default_device()
    if device.type == "cuda":
        return "the GPU", torch.cuda.get_device_properties(device).total_memory
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(Path, LIMITS):
        if path.is_file() and (said := path.read_text().strip()).isdigit():
            has = min(has, int(said))
    return "this machine", has
