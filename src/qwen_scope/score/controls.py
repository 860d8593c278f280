"""Dictionaries that learnt less: what figures of an SAE are read against."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint
from qwen_scope.sae import SAE, Identity
from qwen_scope.text import Counted, TokenRows
from qwen_scope.train import ResidualBuffer, TrainConfig, train

TRAINED, RANDOM = "trained", "random directions"
FROZEN = {
    "frozen decoder": ("W_dec",),
    "frozen encoder": ("W_enc", "b_enc"),
    RANDOM: ("W_enc", "W_dec", "b_enc", "b_dec"),
}
"""By control what stays as it was drawn (arXiv 2602.14111 has the first two). A decoder is drawn as random unit
directions, an encoder as its transpose times the number with which k features reconstruct a batch best, and `b_dec` is
the batch's geometric median; so the last one is fitted by one batch, and nothing of it is learnt."""
ARMS = (TRAINED, *FROZEN)


def tokens_to_train(name: str, tokens: int, batch: int) -> int:
    """How many tokens a control is trained on: whole batches; random directions are fitted by one."""
    return batch if name == RANDOM else tokens // batch * batch


def control(
    name: str,
    sae: SAE,
    k: int,
    model: nn.Module,
    rows: TokenRows,
    point: HookPoint,
    counted: Counted,
    *,
    tokens: int,
    batch: int,
    budget: int,
    seed: int = 0,
) -> SAE:
    """A TopK control of the same width and k as an SAE, trained by our trainer on residuals of some rows.

    Args:
        name: one of `FROZEN`.

    Raises:
        InputError: another name, or rows that do not fill a batch.
    """
    if name not in FROZEN:
        raise InputError(f"a control is one of {', '.join(FROZEN)}, not {name!r}")
    wanted = tokens_to_train(name, tokens, batch)
    config = TrainConfig(d_sae=sae.d_sae, k=k, tokens=wanted, batch=batch, seed=seed, frozen=FROZEN[name])
    source = ResidualBuffer(
        model, rows, [point], batch=batch, budget=budget, most=config.steps * batch, seed=seed, counted=counted
    )
    (made,) = train(config, source, counted=counted, group=name.replace(" ", "-")).values()
    group = f"{sae.identity.group}-{name.replace(' ', '-')}"
    identity = Identity(group, made.identity.layer, made.identity.fingerprint)
    return replace(made, identity=identity)  # pyright: ignore[reportArgumentType]
