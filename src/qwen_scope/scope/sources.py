"""Where a language model and its SAEs are loaded from."""

from __future__ import annotations

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.sae import catalog


def model_source(model: str) -> str:
    """Where a language model is loaded from: the folder of the bundled one for `lab`, else what was given."""
    return catalog.find("lab").model if model == "lab" else model


def resolve(model: str, sae: str | None) -> tuple[str, str]:
    """The source of the model and of the SAEs, with the catalog's help where one of them is left out."""
    if model == "lab":
        return model_source(model), sae or catalog.find("lab").name
    if sae is not None:
        return model, sae
    known = [group.name for group in (*catalog.groups(), *catalog.community()) if group.model == model]
    if len(known) == 1:
        return model, known[0]
    if known:
        raise InputError(f"{model} has several groups of SAEs; name one with sae=: {', '.join(known)}")
    raise NotFoundError(f"the catalog knows no SAEs for {model!r}; name them with sae= (a folder or hub id)")
