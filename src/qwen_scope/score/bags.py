"""Texts as bags: the residuals of their tokens that count, their mean, and the mean activations of features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, LoadedModel, capture
from qwen_scope.sae import SAE
from qwen_scope.text import Counted, padded

ENCODED = 2**14  # tokens that are encoded at a time


@dataclass(frozen=True, eq=False)
class Bags:
    """Texts, each as its tokens.

    Attributes:
        h: residuals, text after text.   lengths: how many of them each text has.
    """

    h: Float[Tensor, "tokens d_model"]
    lengths: Int64[Tensor, " texts"]

    def __len__(self) -> int:
        return len(self.lengths)

    def means(self) -> Float[Tensor, "texts d_model"]:
        """The mean residual of each text."""
        sums = torch.zeros(len(self), self.h.shape[1])
        sums.index_add_(0, self._text_of_token(), self.h.float())
        return sums / self.lengths[:, None]

    def mean_acts(self, sae: SAE) -> Tensor:
        """The mean activation of each feature in each text, `(texts, d_sae)`, sparse."""
        texts, parts = self._text_of_token(), []
        for at in range(0, len(self.h), ENCODED):
            acts = sae.encode(self.h[at : at + ENCODED].to(sae.device).float()).to("cpu")
            fires = acts.values > 0
            row = texts[at : at + ENCODED, None].expand_as(acts.indices)[fires]
            parts.append((torch.stack([row, acts.indices[fires].long()]), acts.values[fires]))
        where, values = (torch.cat(some, dim=-1) for some in zip(*parts, strict=True))
        values = values / self.lengths[where[0]]
        return torch.sparse_coo_tensor(where, values, (len(self), sae.d_sae), check_invariants=True).coalesce()

    def _text_of_token(self) -> Int64[Tensor, " tokens"]:
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)


def read_bags(
    loaded: LoadedModel, point: HookPoint, texts: Sequence[str], counted: Counted, *, tokens: int, batch: int = 16
) -> Bags:
    """The residuals of texts; of a longer one the first `tokens` tokens. Where no token counts, the last stands in.

    Raises:
        InputError: no texts.
    """
    if not texts:
        raise InputError("there is no text to read")
    ids = [tuple(loaded.tokenizer(text)["input_ids"][:tokens]) or (0,) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, Tensor] = {}
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        rows, mask = padded([ids[i] for i in some])
        h = capture(loaded.model, rows, [point], mask)[point].cpu()
        kept = counted.keep(h, point, rows, mask=mask)
        for one, text in enumerate(some):
            last = int(mask[one].sum()) - 1
            found[text] = h[one][kept[one]] if kept[one].any() else h[one][last : last + 1]
    parts = [found[i] for i in range(len(ids))]
    return Bags(torch.cat(parts), torch.tensor([len(part) for part in parts]))
