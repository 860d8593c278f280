"""`TokenFeatures`: what a scope saw in some texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from qwen_scope.errors import InputError, NotFoundError, check_count
from qwen_scope.sae import FeatureActs


@dataclass(frozen=True)
class Strongest:
    """One feature in one text.

    Attributes:
        feature: its index in the dictionary.
        maximum: its largest activation.
        position: the token of that activation.
        rate: the share of the text's tokens on which it is active.
        mean: its mean activation over all tokens.
    """

    feature: int
    maximum: float
    position: int
    rate: float
    mean: float


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """The features of every token of some texts.

    Attributes:
        texts: the texts as tokenised, chat template included.
        tokens: per text, what each token shows; the pieces join to the text.
        input_ids: `(texts, seq)`, padded on the right.
        mask: `(texts, seq)`, True at tokens and False at padding, where no feature is active.
        acts: per layer, `(texts, seq, k)` feature activations.
    """

    texts: list[str]
    tokens: list[list[str]]
    input_ids: Int[Tensor, "texts seq"]
    mask: Bool[Tensor, "texts seq"]
    acts: Mapping[int, FeatureActs]

    @property
    def layers(self) -> list[int]:
        return sorted(self.acts)

    def of(self, text: int, layer: int) -> FeatureActs:
        """The activations of one text at one layer, `(tokens, k)`, without padding.

        Raises:
            InputError: there is no such text.
            NotFoundError: the layer was not asked for.
        """
        if not 0 <= text < len(self.texts):
            raise InputError(f"there is no text {text}: these are texts 0 to {len(self.texts) - 1}")
        if layer not in self.acts:
            raise NotFoundError(f"layer {layer} was not looked at; these are here: {self.layers}")
        return self.acts[layer][text, : len(self.tokens[text])]

    def strongest(self, text: int, layer: int, n: int | None = None, tokens: slice | None = None) -> list[Strongest]:
        """The features of a text ranked by their largest activation; equal ones by lower index.

        Args:
            n: how many; by default all that are active.
            tokens: which tokens count, such as `slice(start, None)` for an answer after its prompt.
        """
        acts = self.of(text, layer)
        if n is not None:
            check_count("n", n)
        start, stop, _ = (tokens or slice(None)).indices(len(self.tokens[text]))
        if stop <= start:
            raise InputError(f"tokens {start} to {stop} of a text of {len(self.tokens[text])} tokens are none")
        acts = acts[start:stop]
        values, features = acts.values.float().cpu().numpy(), acts.indices.cpu().numpy()
        position = np.broadcast_to(np.arange(start, stop)[:, None], values.shape)
        on = values > 0
        values, features, position = values[on], features[on], position[on]
        order = np.lexsort((position, -values, features))
        values, features, position = values[order], features[order], position[order]
        ids, first, count = np.unique(features, return_index=True, return_counts=True)
        total = np.add.reduceat(values, first) if len(first) else values
        rank = np.lexsort((ids, -values[first]))[:n]
        span = stop - start
        return [
            Strongest(
                feature=int(ids[i]),
                maximum=float(values[first[i]]),
                position=int(position[first[i]]),
                rate=float(count[i] / span),
                mean=float(total[i] / span),
            )
            for i in rank
        ]
