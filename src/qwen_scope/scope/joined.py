"""Whether SAEs and a language model belong together, as far as their files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import nn

from qwen_scope.errors import MismatchError
from qwen_scope.model import HookPoint, norms_parts
from qwen_scope.sae import SAE, catalog

# What TransformerLens and sae_lens call models that have another name on the Hub.
SHORT = {"gpt2-small": "gpt2", "gpt2-xl": "gpt2-xl"}
# Parts of a name that tell variants of one model apart: how it was tuned after pretraining ...
TUNED = frozenset({"base", "pt", "instruct", "it", "chat", "sft", "dpo", "rl", "thinking", "post", "trained"})
# ... and how its weights are stored.
STORED = re.compile(
    r"hf|gguf|ggml|mlx|awq|gptq|fp8|bf16|fp16|float16|float32|bnb|int[48]|[48]bit|q[2-8](_[a-z0-9_]+)?|dynamic|unsloth"
)
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")


def words(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """A model's name without its owner as two sets of words: which model, and which of its variants.

    Case, `_` against `-`, how weights are stored and dates of a release don't count.
    """
    last = name.strip().rstrip("/").replace("\\", "/").rpartition("/")[2].lower().removesuffix(".gguf")
    last = SHORT.get(last, last)
    parts = [part for part in re.split(r"[-_ ]+", last) if part and not STORED.fullmatch(part)]
    parts = [part for part in parts if not re.fullmatch(r"2[0-9]{3}", part)]
    return frozenset(p for p in parts if p not in TUNED), frozenset(p for p in parts if p in TUNED)


def names_of_model(source: str) -> list[str]:
    """The names of a model that was loaded from a Hub id or a folder, the most telling one first."""
    path = Path(source)
    if not path.is_dir():
        return [source]
    names = []
    if match := _SNAPSHOT.search(path.resolve().as_posix() + "/"):
        names.append(f"{match[1]}/{match[2]}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}
    said = config.get("_name_or_path") if isinstance(config, dict) else None
    if isinstance(said, str) and said:
        names.append(said)
    return [*names, str(path.resolve())]


def model_named_by(sae: SAE, source: str) -> str | None:
    """The model that the SAE's files name, or the catalog for a released group; None where neither does."""
    said = sae.meta.get("model")
    if isinstance(said, str) and said.strip():
        return said.strip()
    group = catalog.lookup(source)
    return None if group is None else group.model


def difference(trained_on: str, model: str) -> str | None:
    """One sentence where SAEs of one model are used on another, told apart by name alone; None for the same.

    Args:
        trained_on: the model that the SAEs' files name.
        model: the source of the language model: a Hub id or a folder.
    """
    bundled = [group for group in catalog.groups() if group.folder is not None]
    trained_on = next((group.model for group in bundled if trained_on in group.aliases), trained_on)
    names = names_of_model(model)
    if trained_on == model or _same_folder(trained_on, model):
        return None
    which, variant = words(trained_on)
    found = [words(name) for name in names]
    if (which, variant) in found:
        return None
    shown = names[0]
    if any(which == other for other, _ in found):
        return (
            f"the SAEs were trained on {trained_on:.100}, and {shown} is another variant of that model (base or"
            " post-trained): most features carry over, figures measured on the one don't hold for the other"
        )
    return (
        f"the SAEs were trained on another model: their files name {trained_on:.100}, and the model is {shown}; unless"
        " that is the same model under another name, their features mean nothing here"
    )


def check_stream(sae: SAE, model: nn.Module, point: HookPoint) -> None:
    """Refuse an SAE whose stream this model has two of, which tools call by one name.

    Raises:
        MismatchError: TransformerLens reads a part behind the norm that follows it, transformers' module before.
    """
    lens = sae.meta.get("sae_lens")
    if point.stream == "resid_post" or not isinstance(lens, dict) or not norms_parts(model, point.layer):
        return
    metadata = lens.get("metadata")
    said = {**lens, **(metadata if isinstance(metadata, dict) else {})}.get("hook_name")
    if isinstance(said, str) and "hook_" in said:
        raise MismatchError(
            f"{sae.identity} reads {said}, which is behind a norm in {type(model).__name__}; this project reads"
            f" {point} before that norm"
        )


def _same_folder(one: str, other: str) -> bool:
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).resolve() == Path(other).resolve()
