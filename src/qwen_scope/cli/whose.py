"""Whose model answers: where none was named for data of the user's own, the lab does, and says so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_scope.errors import InputError, QwenScopeError

from . import commands, output

# Options that bring texts, files or stores of the user's; every positional argument does, too.
DATA = ("stores", "positive", "negative", "repetition", "promotes", "held_out", "onsets", "looping", "against")
NOTE = (
    "no --model was given, so the bundled lab answers, a tiny model to try commands on;"
    " name yours with --model, or write --model lab"
)


def refuse_other_saes(sae: str | None) -> None:
    """Refuse SAEs of another model where the lab would be taken because none was named.

    Raises:
        InputError: it says which --model to give.
    """
    made_on = model_of(sae) if sae is not None and lab_by_default(whatever=True) else None
    if made_on is not None:
        why = f"the SAEs {sae} were made on {made_on}, and without --model the lab is taken"
        raise InputError(f"{why}: add --model {made_on}")


def say_whose() -> None:
    """Say on standard error that the lab answers, where no model was named for data that are not the lab's."""
    if lab_by_default():
        output.say(f"qwen-scope: {NOTE}")


def say_terms(source: str) -> None:
    """Say on standard error, once in a process, what the owner of released SAEs asks of those who use them."""
    from qwen_scope.sae import tell_terms

    tell_terms(source.rstrip("/").rpartition("/")[2])


def lab_by_default(whatever: bool = False) -> bool:
    """Whether the running command takes the lab because no model was named, although its data are not the lab's.

    Args:
        whatever: the data do not matter.
    """
    ctx = commands.running()
    if ctx is None or "model" not in ctx.params or not left_out(ctx, "model"):
        return False
    if ctx.params["model"] is None and any(ctx.params.get(name) is not None for name in ("folder", "store")):
        return False  # the model is the one that the store was made with
    about = [one.name for one in ctx.command.params if one.param_type_name == "argument" or one.name in DATA]
    return whatever or any(not of_the_lab(value) for name in about for value in each(ctx.params.get(str(name))))


def left_out(ctx: Any, name: str) -> bool:
    """Whether an option has its default because nobody wrote it."""
    source = ctx.get_parameter_source(name)
    return source is None or source.name == "DEFAULT"


def each(value: Any) -> Iterable[Any]:
    """The values of an option that may be repeated, or the one value; of None none."""
    return () if value is None else value if isinstance(value, list | tuple) else (value,)


def of_the_lab(value: Any) -> bool:
    """Whether data are the lab's own."""
    return str(value) == "lab" or str(value).startswith("lab:")


def model_of(sae: str) -> str | None:
    """The language model that SAEs were made on, if it is not the lab's: by the catalog, or as their files say.

    Nothing is downloaded; None where it is the lab or not known.
    """
    from qwen_scope.sae import catalog, layers_of, load_sae

    lab = catalog.find("lab")
    listed = catalog.lookup(sae) or catalog.lookup(Path(sae).name)
    if listed is not None:
        return None if listed.folder is not None else listed.model
    if not Path(sae).exists():
        return None
    try:
        said = load_sae(sae, layers_of(sae)[0]).meta.get("model")
    except QwenScopeError:  # whoever opens it says what is wrong
        return None
    return said if isinstance(said, str) and said not in ("lab", lab.name, lab.model) else None


def saes_of_lab(sae: str) -> bool:
    """Whether SAEs are the bundled ones, or were trained on the lab as their files say."""
    from qwen_scope.sae import catalog, layers_of, load_sae
    from qwen_scope.scope import model_named_by

    listed = catalog.lookup(sae) or catalog.lookup(Path(sae).name)
    if listed is not None:
        return listed.folder is not None
    lab = catalog.find("lab")
    return Path(sae).exists() and model_named_by(load_sae(sae, layers_of(sae)[0]), sae) in ("lab", lab.name, lab.model)
