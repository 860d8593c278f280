"""Recipes for runtimes that know nothing of this toolkit: a control vector of llama.cpp, an ablated checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_scope.errors import foreign
from qwen_scope.files import write_folder
from qwen_scope.model import text_config
from qwen_scope.scope import Scope
from qwen_scope.steer import (
    SAMPLE,
    Intervention,
    ablated,
    control_vector,
    log_probabilities,
    write_control_vector,
)

from .changes import scored_rows


def export_control_vector(
    scope: Scope, interventions: Sequence[Intervention], out: str | os.PathLike[str]
) -> list[int]:
    """Write what the interventions add as a GGUF that llama.cpp's `--control-vector` takes; the layers in it.

    Raises:
        InputError, NotFoundError, MismatchError: as `steer.control_vector` and `steer.write_control_vector`.
    """
    vectors = control_vector(scope.model, interventions, scope.saes, scope.stats)
    write_control_vector(vectors, out, text_config(scope.model).model_type)
    return list(vectors)


@dataclass(frozen=True)
class Difference:
    """Between log-probabilities of tokens under the written model and under the recipe, in nats.

    Attributes:
        mean, largest: of its absolute value.
        tokens: how many, of `steer.SAMPLE`.
    """

    mean: float
    largest: float
    tokens: int


def export_ablated(scope: Scope, interventions: Sequence[Intervention], out: str | os.PathLike[str]) -> Difference:
    """Write the model without the directions that the interventions ablate, as a Hugging Face folder with tokenizer.

    Returns how far it is from the recipe: nothing but rounding for parts of blocks (`steer.ablated` says why the
    outputs of all layers lose a little more).

    Raises:
        InputError, NotFoundError, MismatchError, FormatError: as `steer.ablated`; a folder that can't be written.
    """
    made = ablated(scope.model, interventions)
    rows = scored_rows(scope, SAMPLE)
    steered = np.concatenate(log_probabilities(scope.model, rows, interventions))
    off = np.abs(np.concatenate(log_probabilities(made, rows)) - steered)
    with write_folder(out) as part, foreign(f"the model can't be saved to {os.fspath(out)!r}"):
        made.save_pretrained(part)
        scope.tokenizer.save_pretrained(part)
        for file in part.glob("*.safetensors"):  # written for the owner's eyes alone
            shutil.copymode(part / "config.json", file)
    return Difference(float(off.mean()), float(off.max()), len(off))
