"""What steering with features costs, and whether it moves what it should: the loss of steering.

A feature is added at every token, at one dose for all. On texts in which it never fires the rise of the next-token loss
is its cost. Where it fires most the loss should rise less, or fall: the difference is its effect. Random directions
have about the cost of a feature and no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, LoadedModel, capture, changing
from qwen_scope.sae import SAE
from qwen_scope.text import Counted

FEATURES, TEXTS, DOSE = 32, 8, 0.5
"""Features that are tried, texts of either kind, and the dose in median norms of the residual."""
LENGTH, ROWS = 48, 256


@dataclass(frozen=True, eq=False)
class Reading:
    """What the features of every arm are tried on.

    Attributes:
        ids: rows of tokens.   h: their residuals.   counted: which tokens count.
        norm: the median norm of those that do.   plain: the log-probability per token of each row.
    """

    loaded: LoadedModel
    point: HookPoint
    ids: Tensor
    h: Tensor
    counted: Tensor
    norm: float
    plain: Tensor


def read_rows(loaded: LoadedModel, point: HookPoint, rows: Sequence[Tensor], counted: Counted) -> Reading:
    """Cut rows of text into short ones, and read them.

    Raises:
        InputError: too few for texts of both kinds.
    """
    length = min(LENGTH, rows[0].shape[1])
    ids = torch.cat([row[:, at : at + length] for row in rows for at in range(0, row.shape[1] - length + 1, length)])
    ids = ids[:ROWS]
    if len(ids) < 4 * TEXTS:
        raise InputError(f"{len(ids)} rows of {length} tokens are too few to steer on; raise tokens")
    h, plain = [], []
    for some in ids.split(2 * TEXTS):
        h.append(capture(loaded.model, some, [point])[point].cpu())
        plain.append(_log_probability(loaded, some))
    residuals = torch.cat(h)
    kept = counted.keep(residuals, point, ids)
    norm = float(torch.linalg.vector_norm(residuals[kept].float(), dim=-1).median())
    return Reading(loaded, point, ids, residuals, kept, norm, torch.cat(plain))


@torch.no_grad()
def steering_loss(sae: SAE, given: Reading, *, features: int = FEATURES, seed: int = 0) -> dict[str, float]:
    """Mean over features of the cost, and of the effect, in nats per token.

    Features are drawn among those that fire in at least `TEXTS` rows and are silent in as many.

    Raises:
        InputError: fewer than four such features.
    """
    strongest = torch.zeros(len(given.ids), sae.d_sae)
    for row in range(len(given.ids)):
        acts = sae.encode(given.h[row][given.counted[row]].to(sae.device).float()).to("cpu")
        strongest[row].scatter_reduce_(0, acts.indices.flatten().long(), acts.values.flatten(), "amax")
    fires = (strongest > 0).sum(0)
    able = torch.linalg.vector_norm(sae.W_dec.float(), dim=0).cpu() > 0
    fitting = torch.where((fires >= TEXTS) & (len(given.ids) - fires >= TEXTS) & able)[0].numpy()
    if len(fitting) < 4:
        raise InputError(
            f"{len(fitting)} features fire in some of {len(given.ids)} rows and are silent in others; raise tokens"
        )
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(fitting)[:features].tolist()
    costs, effects = [], []
    for feature in chosen:
        own = strongest[:, feature].topk(TEXTS).indices
        silent = rng.permutation(torch.where(strongest[:, feature] == 0)[0].numpy())[:TEXTS]
        both = torch.cat([own, torch.from_numpy(silent)])
        direction = sae.W_dec[:, feature].float()
        added = direction / torch.linalg.vector_norm(direction) * (DOSE * given.norm)
        with changing(given.loaded.model, {given.point: lambda h, _, d=added: h + d.to(h)}):
            change = _log_probability(given.loaded, given.ids[both]) - given.plain[both]
        costs.append(-float(change[TEXTS:].mean()))
        effects.append(float(change[:TEXTS].mean() - change[TEXTS:].mean()))
    return {"steering loss": float(np.mean(costs)), "steering effect": float(np.mean(effects))}


@torch.no_grad()
def _log_probability(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Per row the mean log-probability of its tokens but the first."""
    ids = ids.to(next(loaded.model.parameters()).device)
    logits = loaded.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean((1, 2)).cpu()
