"""`TokenFeatures`: what a scope saw in some texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from qwen_scope.errors import InputError, NotFoundError, check_count
from qwen_scope.report import HasFrames, Markup, Table, element, html_tokens, join, marks_note, styled
from qwen_scope.sae import FeatureActs
from qwen_scope.text import PHASES, REASONS, Phase, Tokens, phase_numbers, tally

TEXTS_SHOWN, FEATURES_SHOWN, TOKENS_SHOWN = 3, 5, 200
"""What a notebook shows."""


@dataclass(frozen=True)
class Strongest:
    """One feature in one text.

    Attributes:
        feature: its index in the dictionary.
        maximum: its largest activation.
        position: the token of that activation.
        rate: the share of the tokens that count on which it is active.
        mean: its mean activation over the tokens that count.
    """

    feature: int
    maximum: float
    position: int
    rate: float
    mean: float


@dataclass(frozen=True, eq=False, repr=False)
class TokenFeatures(HasFrames):
    """The features of every token of some texts.

    Attributes:
        texts: the texts as tokenised, chat template included.
        tokens: per text, what each token shows; the pieces join to the text.
        input_ids: `(texts, seq)`, padded on the right.
        mask: `(texts, seq)`, True at tokens and False at padding, where no feature is active.
        acts: per layer, `(texts, seq, k)` feature activations.
        source: the tokens as they were read; it knows the turn and the phase of each.
        reasons: per layer and token why it does not count, `(texts, seq)`: an index into `qwen_scope.text.REASONS`, 0
            where it counts. Every token has its features; those that count alone rank, average and compare.
    """

    texts: list[str]
    tokens: list[list[str]]
    input_ids: Int[Tensor, "texts seq"]
    mask: Bool[Tensor, "texts seq"]
    acts: Mapping[int, FeatureActs]
    source: Tokens
    reasons: Mapping[int, UInt8[Tensor, "texts seq"]]

    @property
    def layers(self) -> list[int]:
        return sorted(self.acts)

    def __repr__(self) -> str:
        texts, tokens = len(self.texts), int(self.mask.sum())
        said = f"{texts} text{'s' * (texts != 1)}, {tokens:,} tokens"
        return f"TokenFeatures({said}, layers {', '.join(map(str, self.layers))})"

    def sheet(self) -> Table:
        """A row for each feature that is active on a token, the strongest first."""
        rows = []
        for i, tokens in enumerate(self.tokens):
            for layer in self.layers:
                acts, left_out = self.of(i, layer), self.left_out(i, layer)
                for at, some in enumerate(zip(acts.indices.tolist(), acts.values.tolist(), strict=True)):
                    here = (i, at, tokens[at], left_out[at], layer)
                    rows += [(*here, feature, value) for feature, value in zip(*some, strict=True) if value > 0]
        columns = ("text", "position", "token", "left_out", "layer", "feature", "activation")
        return Table("Features of each token", columns, rows)

    def _repr_html_(self) -> str:
        """The strongest features of the first texts at the middle layer, each on the tokens it fires on."""
        layer = self.layers[len(self.layers) // 2]
        parts = [element("p", element("b", repr(self)))]
        for i, tokens in enumerate(self.tokens[:TEXTS_SHOWN]):
            acts, left_out = self.of(i, layer), self.left_out(i, layer)
            for one in self.strongest(i, layer, FEATURES_SHOWN):
                values = acts.select([one.feature])[:TOKENS_SHOWN, 0].tolist()
                place = f"{layer}/{one.feature}, at most {one.maximum:.3g}:"
                parts.append(html_tokens(tokens[:TOKENS_SHOWN], values, one.maximum, place, left_out[:TOKENS_SHOWN]))
            note = marks_note(left_out[:TOKENS_SHOWN], "A dashed frame")
            parts.append(element("p", note, class_="place") if note else Markup(""))
        return styled(join(*parts))

    def of(self, text: int, layer: int) -> FeatureActs:
        """The activations of one text at one layer, `(tokens, k)`, without padding.

        Raises:
            InputError: there is no such text.
            NotFoundError: the layer was not asked for.
        """
        self._check_text(text)
        self._check_layer(layer)
        return self.acts[layer][text, : len(self.tokens[text])]

    def left_out(self, text: int, layer: int) -> list[str]:
        """Per token of a text why it does not count at a layer: `first`, `special`, `sink`, `phase`; or "".

        Raises:
            InputError, NotFoundError: as `of`.
        """
        self._check_text(text)
        self._check_layer(layer)
        found = self.reasons[layer][text, : len(self.tokens[text])].tolist()
        return [REASONS[reason] if reason else "" for reason in found]

    def counts(self, text: int, layer: int) -> Bool[Tensor, " tokens"]:
        """Which tokens of a text count at a layer.

        Raises:
            InputError, NotFoundError: as `of`.
        """
        self._check_text(text)
        self._check_layer(layer)
        return self.reasons[layer][text, : len(self.tokens[text])] == 0

    def tally(self, layer: int, tokens: slice | None = None) -> dict[str, int]:
        """How many tokens of all texts have each of `qwen_scope.text.REASONS` at a layer.

        Args:
            tokens: only these of each text, such as `slice(start, None)` for an answer after its prompt.

        Raises:
            NotFoundError: the layer was not asked for.
        """
        self._check_layer(layer)
        return tally(self.reasons[layer][:, tokens or slice(None)])

    def phases(self, text: int) -> list[Phase]:
        """The phase of every token of a text: `text` outside chats.

        Raises:
            InputError: there is no such text, or its chat template gives no markers to tell the phases by.
        """
        self._check_text(text)
        return [PHASES[i] for i in self.source.phases(text)[1]]

    def turns(self, text: int) -> list[int]:
        """The turn of every token of a text: the index of its message, as `Span` counts them.

        Raises:
            InputError: as `phases`.
        """
        self._check_text(text)
        return self.source.phases(text)[0].tolist()

    def strongest(
        self,
        text: int,
        layer: int,
        n: int | None = None,
        tokens: slice | None = None,
        phases: Collection[str] | None = None,
    ) -> list[Strongest]:
        """The features of a text ranked by their largest activation on tokens that count; equal ones by lower index.

        None where no token of those asked for counts, as in a text of one token.

        Args:
            n: how many; by default all that are active.
            tokens: only these tokens, such as `slice(start, None)` for an answer after its prompt.
            phases: of these, only tokens of some phases, such as `("thinking",)`.

        Raises:
            InputError: no such text, no token asked for, or a phase that there is not.
        """
        acts = self.of(text, layer)
        if n is not None:
            check_count("n", n)
        start, stop, _ = (tokens or slice(None)).indices(len(self.tokens[text]))
        if stop <= start:
            raise InputError(f"tokens {start} to {stop} of a text of {len(self.tokens[text])} tokens are none")
        chosen = np.arange(start, stop)
        if phases is not None:
            chosen = chosen[np.isin(self.source.phases(text)[1][chosen], phase_numbers(phases))]
            if not len(chosen):
                raise InputError(f"no token of the text is of the phase {' or '.join(sorted(phases))}")
        chosen = chosen[self.counts(text, layer).numpy()[chosen]]
        acts = acts[torch.from_numpy(chosen).to(acts.indices.device)]
        values, features = acts.values.float().cpu().numpy(), acts.indices.cpu().numpy()
        position = np.broadcast_to(chosen[:, None], values.shape)
        on = values > 0
        values, features, position = values[on], features[on], position[on]
        order = np.lexsort((position, -values, features))
        values, features, position = values[order], features[order], position[order]
        ids, first, count = np.unique(features, return_index=True, return_counts=True)
        total = np.add.reduceat(values, first) if len(first) else values
        rank = np.lexsort((ids, -values[first]))[:n]
        span = len(chosen)
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

    def _check_layer(self, layer: int) -> None:
        if layer not in self.acts:
            raise NotFoundError(f"layer {layer} was not looked at; these are here: {self.layers}")

    def _check_text(self, text: int) -> None:
        if not 0 <= text < len(self.texts):
            raise InputError(f"there is no text {text}: these are texts 0 to {len(self.texts) - 1}")


def spread(acts: FeatureActs, mask: Tensor, order: Sequence[int]) -> FeatureActs:
    """Activations of the tokens of texts in `order` back to `(texts, seq, k)`; padding gets unused slots."""
    source = _source(mask, order)
    indices = acts.indices.new_zeros(*mask.shape, acts.k)
    values = acts.values.new_zeros(*mask.shape, acts.k)
    indices[mask], values[mask] = acts.indices[source], acts.values[source]
    return FeatureActs(indices, values, acts.width)


def spread_flags(flags: Tensor, mask: Tensor, order: Sequence[int]) -> Tensor:
    """A flag per token of texts in `order` back to `(texts, seq)`; False at padding."""
    out = flags.new_zeros(mask.shape)
    out[mask] = flags[_source(mask, order)]
    return out


def _source(mask: Tensor, order: Sequence[int]) -> Tensor:
    lengths, rows = mask.sum(-1), torch.tensor(order)
    start = torch.zeros(len(mask), dtype=torch.long)
    start[rows] = lengths[rows].cumsum(0) - lengths[rows]
    return torch.cat([torch.arange(int(s), int(s + n)) for s, n in zip(start, lengths, strict=True)])
