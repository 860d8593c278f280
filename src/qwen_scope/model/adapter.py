"""PEFT adapters: read with the model they were trained on, and merged into its weights."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qwen_scope.errors import FormatError, InputError, QwenScopeWarning, foreign, need
from qwen_scope.files import read_object

CONFIG = "adapter_config.json"


def is_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether a source is a folder with an adapter and no model of its own, though perhaps with its base's config."""
    folder = Path(source).expanduser()
    whole = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    return (folder / CONFIG).is_file() and not whole


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter brings a tokenizer of its own."""
    return (folder / "tokenizer.json").is_file()


def base_of(folder: Path) -> str:
    """The model that an adapter was trained on: a Hub id, or a folder, also one beside the adapter.

    Raises:
        FormatError: its config does not say.
    """
    base = read_object(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise FormatError(f"the adapter in {folder} does not say which model it is for; name that, and it as adapter=")
    beside = folder / base
    return str(beside) if not Path(base).is_absolute() and not Path(base).exists() and beside.is_dir() else base


def merge(model: PreTrainedModel, name: str, folder: Path) -> PreTrainedModel:
    """The model with an adapter added to its weights, in their type: what `merge_and_unload` of PEFT gives.

    Args:
        name: of the model, to be compared with the one that the adapter was trained on.

    Raises:
        NotFoundError: the package peft is missing.
        FormatError: it can't be read, or does not fit the model.
        InputError: it is of a kind that can't be merged, such as learnt prompts, or the weights are quantised.
    """
    need("reading an adapter", "peft")
    from peft import PeftModel

    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(f"an adapter can't be merged into quantised weights; name {name!r} in its original precision")
    hint = "name the model that it was trained on"
    with (
        foreign(f"the adapter in {folder} does not fit {name!r}", hint=hint),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    if left := next((str(one.message) for one in told if "missing adapter keys" in str(one.message)), None):
        raise FormatError(f"the adapter in {folder} does not fit {name!r}: {left.splitlines()[0][:200]}; {hint}")
    if not hasattr(adapted, "merge_and_unload") or not hasattr(adapted.base_model, "merge_adapter"):
        kind = type(adapted.active_peft_config).__name__
        raise InputError(f"the adapter in {folder} ({kind}) is no change of weights, so it can't be merged")
    with foreign(f"the adapter in {folder} can't be merged into {name!r}"):
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    return merged.eval().requires_grad_(False)


def compare_base(folder: Path, name: str) -> None:
    """Say where an adapter was trained on a model of another name than the one it is put on."""
    said = read_object(folder / CONFIG).get("base_model_name_or_path")
    if isinstance(said, str) and said and last(said) != last(name):
        warnings.warn(f"the adapter in {folder} was trained on {said!r} and is put on {name!r}", QwenScopeWarning, 3)


def last(name: str) -> str:
    """The last part of a path or a Hub id, in lower case."""
    return name.rstrip("/").replace("\\", "/").rpartition("/")[2].lower()
