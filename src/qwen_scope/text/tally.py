"""How many tokens count and how many do not, by reason, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import UInt8
from torch import Tensor

REASONS = ("counts", "padding", "special", "first", "phase", "sink")
"""What `Counted.reasons` answers per token, as an index; the earliest reason that applies, after "counts"."""


def tally(reasons: UInt8[Tensor, "*any"]) -> dict[str, int]:
    """How many tokens have each of `REASONS`; add the dictionaries of several batches."""
    found = torch.bincount(reasons.flatten().long(), minlength=len(REASONS)).tolist()
    return dict(zip(REASONS, found, strict=True))


def summary(left_out: Mapping[str, int]) -> str:
    """A line such as "left out: 12 special tokens, 3 sinks of 1,024 tokens"; padding is no token.

    Args:
        left_out: what `tally` gives.
    """
    total = sum(count for reason, count in left_out.items() if reason != "padding")
    words = {"special": "special token", "first": "first token", "phase": "token of other phases", "sink": "sink"}
    parts = [
        f"{left_out[key]:,} {word if left_out[key] == 1 else _plural(word)}"
        for key, word in words.items()
        if left_out.get(key)
    ]
    return f"left out: {', '.join(parts) or 'none'} of {total:,} token{'' if total == 1 else 's'}"


def summaries(by_layer: Mapping[int, Mapping[str, int]]) -> list[str]:
    """Lines such as "layers 2, 3: left out: 1 sink of 20 tokens": one for all layers that leave out the same.

    Args:
        by_layer: what `tally` gives, by layer; layers are named where they differ. No line where every token counts.
    """
    said: dict[str, list[int]] = {}
    for layer, tally in by_layer.items():
        said.setdefault(summary(tally), []).append(layer)
    if all(not count or reason in ("counts", "padding") for one in by_layer.values() for reason, count in one.items()):
        return []
    if len(said) == 1:
        return list(said)
    return [
        f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}: {line}" for line, layers in said.items()
    ]


def _plural(word: str) -> str:
    return "tokens" + word.removeprefix("token") if word.startswith("token") else word + "s"
