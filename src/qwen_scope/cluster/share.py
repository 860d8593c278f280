"""One worker's share of an extraction, whoever started it: what it opens, where it may write, how it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_scope.errors import InputError, QwenScopeError, loaded, plain
from qwen_scope.files import Remote
from qwen_scope.sae import SAE
from qwen_scope.scope import Job, ModelEngine, Scope

REFUSED = "refused"
"""What a worker tells in place of a window: the kind and the sentence of an error."""


def check_shared(job: Job) -> None:
    """Refuse a store that other processes can't write to.

    Raises:
        InputError: it is in the memory of this one.
    """
    if isinstance(job.folder, Remote) and job.folder.protocol == "memory":
        raise InputError(
            f"workers can't write to {job.folder}, which is in the memory of this process alone; name a folder or"
            " a bucket that all of them reach"
        )


def opened(scope: Scope, job: Job) -> tuple[ModelEngine, dict[int, SAE], Any]:
    """The model, the SAEs of an extraction and the device they come to for their turn, as `Job.write` takes them."""
    saes = scope.saes.mapped()
    device = None if str(scope.saes.device).startswith("cpu") else scope.saes.device
    return ModelEngine(scope.model, job.batch_tokens), {layer: saes[layer] for layer in job.fingerprints}, device


def refusal(error: QwenScopeError) -> dict[str, Any]:
    """An error as a worker tells it."""
    return {REFUSED: plain(error)}


def accepted(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker has told of a window.

    Raises:
        QwenScopeError: it has told a refusal.
    """
    if REFUSED in told:
        raise loaded(*told[REFUSED])
    return dict(told)
