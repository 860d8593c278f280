"""Which tokens count on a model: thresholds for sinks from a forward pass, or as an SAE's files carry them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError, MismatchError, QwenScopeWarning
from qwen_scope.sae import SAE
from qwen_scope.text import LEAST, Counted

from .families import n_layers
from .hookpoint import HookPoint
from .hooks import capture

SAMPLE_TOKENS = 6000
"""Enough for steady thresholds on real models; a second or two on a small one."""

Read = tuple[Tensor, Tensor | None, Mapping[HookPoint, Tensor]]
"""A batch as a model reads it: token ids and mask, and the residuals by hook point."""

PASS_TOKENS = 1024  # per forward pass: the residuals of every layer are held together


def measure_counted(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Tensor],
    hook_points: Iterable[HookPoint] | None = None,
    *,
    tokens: int = SAMPLE_TOKENS,
    sample: str = "",
) -> Counted:
    """Without first tokens, special tokens, and sinks by thresholds measured on the first `tokens` tokens of the rows.

    Where the rows hold fewer than 100 ordinary tokens there is no threshold, which is said in a warning.

    Args:
        rows: batches of token ids without padding, `(rows, row)`, that begin as the model expects, as `TokenRows` gives
            them. No more batches are taken than are needed.
        hook_points: where thresholds are needed besides the residual after every layer, which is always measured: a
            layer is judged with the help of its neighbours.
        sample: what the rows are, in words.

    Raises:
        InputError: no rows, or whatever `capture` refuses.
        NotFoundError: a hook point that the model does not have.
        FormatError: a residual is NaN.
    """
    counted = Counted.of(tokenizer)
    taken = list(_taken(rows, tokens))
    if not taken:
        raise InputError("there are no tokens to measure thresholds for sinks on")
    if too_few(counted, [(row, None) for row in taken], sample):
        return counted
    points = points_of_thresholds(model, hook_points)
    return with_thresholds(counted, ((row, None, capture(model, row, points)) for row in taken), points, sample)


def too_few(counted: Counted, batches: Iterable[tuple[Tensor, Tensor | None]], sample: str) -> bool:
    """Whether token ids, `(batch, seq)` with their masks, hold too few ordinary tokens for thresholds; said in a
    warning."""
    there = [
        (int(counted.at(ids, mask=mask).sum()), ids.numel() if mask is None else int(mask.sum()))
        for ids, mask in batches
    ]
    if sum(ordinary for ordinary, _ in there) >= LEAST:
        return False
    warnings.warn(
        f"sinks at later places are not left out: {sample or 'the sample'} has only {sum(n for _, n in there)} tokens,"
        f" and thresholds need {LEAST} ordinary ones",
        QwenScopeWarning,
        3,
    )
    return True


def points_of_thresholds(model: nn.Module, hook_points: Iterable[HookPoint] | None = None) -> list[HookPoint]:
    """Where norms are needed for thresholds: those asked for, first so that an error names one of them, and the
    residual after every layer."""
    return list(dict.fromkeys([*(hook_points or ()), *(HookPoint(layer) for layer in range(n_layers(model)))]))


def with_thresholds(counted: Counted, read: Iterable[Read], points: Sequence[HookPoint], sample: str) -> Counted:
    """The same with thresholds for sinks, measured on what `points_of_thresholds` gave on some batches.

    Args:
        read: of each batch the token ids and the mask, `(batch, seq)` each or None, and the residuals by hook point.

    Raises:
        FormatError: a residual is NaN.
    """
    sizes: dict[HookPoint, list[np.ndarray]] = {point: [] for point in points}
    ids, positions = [], []
    for row, mask, found in read:
        real = torch.ones_like(row, dtype=torch.bool) if mask is None else mask.cpu().bool()
        ids.append(row.cpu()[real].numpy())
        positions.append((real.long().cumsum(-1) - 1)[real].numpy())
        for point in points:
            norms = torch.linalg.vector_norm(found[point], dim=-1, dtype=torch.float32).cpu()
            sizes[point].append(norms[real].numpy())
    norms = {point: np.concatenate(parts) for point, parts in sizes.items()}
    tokens, places = np.concatenate(ids), np.concatenate(positions)
    said = f"the first {len(tokens):,} tokens of {sample}" if sample else f"{len(tokens):,} tokens"
    # What a block adds is large where it writes a sink, and not at the next block: no neighbour can confirm it.
    alone = [{point: norms.pop(point)} for point in list(norms) if point.stream != "resid_post"]
    found = [counted.measure(some, places, ids=tokens, sample=said) for some in (norms, *alone)]
    limits = {at: norm for one in found for at, norm in one.norms.items()}
    return replace(found[0], norms={str(point): limits[str(point)] for point in sorted(points)})


def counted_of(saes: Iterable[SAE]) -> Counted | None:
    """Which tokens counted when SAEs of one model were trained, as their files say; None where one does not say it.

    The threshold of a hook point is that of the SAE there.

    Raises:
        FormatError: a record that is none.
        MismatchError: SAEs that differ in more than thresholds.
    """
    found: dict[str, Any] | None = None
    for sae in saes:
        data = sae.meta.get("counted")
        if data is None:
            return None
        one = Counted.from_json(data, f"'counted' in the files of {sae.identity}")
        data = one.to_json()
        if found is None:
            found = data
            continue
        if any(data[key] != found[key] for key in ("first", "special", "phases")):
            raise MismatchError(
                "the SAEs were trained on other tokens, some with and some without first or special ones; name layers"
                " that were trained alike"
            )
        own = {at: norm for at, norm in one.norms.items() if at == sae.hook_point}
        found["norms"] = {**one.norms, **found["norms"], **own}
    return None if found is None else Counted.from_json(found)


def _taken(rows: Iterable[Tensor], tokens: int) -> Iterable[Tensor]:
    """Rows of at least `tokens` tokens together, in parts that fit one forward pass."""
    left = tokens
    for batch in rows:
        wanted = batch[: -(-left // batch.shape[1])]
        yield from wanted.split(max(1, PASS_TOKENS // batch.shape[1]))
        left -= wanted.numel()
        if left <= 0:
            return
