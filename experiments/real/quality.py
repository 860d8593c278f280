"""How well an SAE of recorded residuals reconstructs held-out text, in sums that intervals can be made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.real.residuals import HELD_OUT, Residuals
from qwen_scope.model import HookPoint, changing
from qwen_scope.sae import SAE, TopK
from qwen_scope.stats import ClusterSums, Interval
from qwen_scope.text import Counted

STRETCH = 4096  # held-out tokens, one text after the other, that an interval draws together
ROWS = 4  # rows of tokens whose loss is one draw of an interval


def components(x: Tensor, k: int) -> SAE:
    """The projection of `x (n, d_model)` on k principal components, the two signs of each as two features."""
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    v = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -k:].T
    w = torch.cat([v, -v])
    return TopK(w.float(), w.T.float().contiguous(), (-(w @ mean)).float(), mean.float(), len(w))


def errors(sae: SAE, x: Tensor) -> dict[str, Any]:
    """By stretch of `x`: `sum |x - x_hat|^2`, `sum |x - mean|^2`, tokens, and the sum of the share explained per token.

    The mean is that of all of `x`. Beside them L0 and how many features never fired.
    """
    parts = x.split(STRETCH)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(x)
    fired, active, sums = torch.zeros(sae.d_sae, dtype=torch.bool), 0, []
    for part in parts:
        acts = sae.encode(part.float())
        gap = (part.float() - sae.decode(acts)).double().square().sum(1)
        spread = (part.double() - mean).square().sum(1)
        on = acts.values > 0
        fired[acts.indices[on].long()] = True
        active += int(on.sum())
        sums.append([float(gap.sum()), float(spread.sum()), len(part), float((1 - gap / spread).sum())])
    return {"sums": sums, "l0": active / len(x), "never": int((~fired).sum())}


def fvu(found: Mapping[str, Any]) -> float:
    gap, spread = np.array(found["sums"])[:, :2].sum(0)
    return float(gap / spread)


@torch.no_grad()
def losses(
    model: nn.Module,
    rows: Iterable[Tensor],
    counted: Counted,
    point: HookPoint,
    put: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """The next-token loss of every `ROWS` rows of tokens, with `put` of the residuals in the place of those that
    count; None leaves the model as it is."""
    found = []
    for ids in (some for batch in rows for some in batch.split(ROWS)):

        def replaced(h: Tensor, _: Any, ids: Tensor = ids) -> Tensor:
            assert put is not None
            return torch.where(counted.keep(h, point, ids)[..., None], put(h).to(h), h)

        with changing(model, {} if put is None else {point: replaced}):
            logits = model(input_ids=ids, use_cache=False).logits
        found.append(float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())))
    return found


def bounds(kept: Residuals, layer: int, rows: int) -> dict[str, list[float]]:
    """The losses that a reconstruction lies between: of the model as it is, and with zeros for its residuals."""
    of = kept.loaded.model, rows_of(kept, rows), kept.counted, HookPoint(layer)
    return {"clean": losses(*of), "zero": losses(*of, torch.zeros_like)}


def rows_of(kept: Residuals, rows: int) -> list[Tensor]:
    """The first so many held-out rows of tokens."""
    tokens = kept.rows(HELD_OUT)
    return [torch.cat(list(islice(tokens, -(-rows // tokens.batch_size))))[:rows]]


def measured(
    kept: Residuals, layer: int, sae: SAE, rows: int, known: Mapping[str, list[float]] | None = None
) -> dict[str, Any]:
    """`errors` of the held-out residuals of a layer, and by `ROWS` held-out rows of tokens the next-token loss: of the
    model as it is, with the reconstruction, and with zeros in the place of every residual that counts.

    Args:
        known: what `bounds` gives, which is the same for every SAE.
    """
    found, known = errors(sae, kept.of(HELD_OUT, layer)), known or bounds(kept, layer, rows)
    of = kept.loaded.model, rows_of(kept, rows), kept.counted, HookPoint(layer)
    spliced = losses(*of, lambda h: sae.decode(sae.encode(h)))
    return {**found, "losses": list(zip(known["clean"], spliced, known["zero"], strict=True))}


def figures(row: Mapping[str, Any]) -> dict[str, Interval]:
    """Explained variance, its mean over tokens, and loss recovered, over stretches of held-out text."""
    gap, spread, tokens, shares = np.array(row["sums"]).T
    sums = ClusterSums({"gap": gap, "spread": spread, "tokens": tokens, "shares": shares})
    clean, spliced, zero = np.array(row["losses"]).T
    losses = ClusterSums({"clean": clean, "spliced": spliced, "zero": zero})
    return {
        "ev": sums.interval(lambda s: 1 - s["gap"] / s["spread"]),
        "per_token": sums.interval(lambda s: s["shares"] / s["tokens"]),
        "recovered": losses.interval(lambda s: (s["zero"] - s["spliced"]) / (s["zero"] - s["clean"])),
    }


def ahead(ours: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Interval]:
    """Explained variance and recovered loss of ours less another's, on the same draws of text."""
    (gap, spread), (theirs, _) = (np.array(row["sums"]).T[:2] for row in (ours, other))
    sums = ClusterSums({"ours": gap, "theirs": theirs, "spread": spread})
    (clean, mine, zero), (_, his, _) = (np.array(row["losses"]).T for row in (ours, other))
    losses = ClusterSums({"ours": mine, "theirs": his, "clean": clean, "zero": zero})
    return {
        "ev": sums.interval(lambda s: (s["theirs"] - s["ours"]) / s["spread"]),
        "recovered": losses.interval(lambda s: (s["theirs"] - s["ours"]) / (s["zero"] - s["clean"])),
    }
