"""The extra terms of a training loss: SASFT's on features, and the baseline on tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import HookPoint, final_norm, n_layers, unembedding
from qwen_scope.steer import SAEsByLayer

from .options import check_scale
from .table import AlphaTable

NO_GROUP, IGNORED = -1, -100
"""The number of a token whose text has no group, and the label of one that is not learnt."""


def feature_loss(
    h: Float[Tensor, "tokens d_model"],
    W: Float[Tensor, "features d_model"],
    b: Float[Tensor, " features"],
    alpha: Float[Tensor, "tokens features"],
    n_tokens: int,
    *,
    enhance: bool = False,
) -> Float[Tensor, ""]:
    """`sum ReLU(f_s(h) - alpha) / (n_tokens * features + 1)`, in fp32; gradients reach `h` alone.

    SASFT (arXiv 2507.14894, equations 26 and 27) with the denominator of its code: every response token of the step
    counts, also those of samples that are left out, so it is a mean and not a sum.

    Args:
        h: residuals of the tokens that are held to their thresholds.
        W, b: encoder rows and biases of the chosen features; `f_s(h) = h @ W.T + b`.
        alpha: the threshold of every token and feature.
        n_tokens: response tokens that the sum is normalised by, such as those of the whole optimiser step.
        enhance: `ReLU(alpha - f_s)` instead, which lifts the features up to their thresholds.
    """
    above = h.float() @ W.T + b - alpha
    return torch.relu(-above if enhance else above).sum() / (n_tokens * len(b) + 1)


def token_loss(
    h: Float[Tensor, "tokens d_model"], norm: nn.Module, W_U: Tensor, tokens: Int[Tensor, " chosen"], n_tokens: int
) -> Float[Tensor, ""]:
    """The summed probability of the chosen next tokens, over `n_tokens + 1`: the penalty SASFT is compared with.

    Its authors say no more than that it lowers the predicted probability of the target's tokens; this is the plainest
    such term, with a denominator like that of `feature_loss`.

    Args:
        h: residuals after the last block, of the tokens before those that are learnt.
        W_U: the unembedding, `(vocab, d_model)`.
    """
    normed = norm(h)
    logits = (normed @ W_U.to(normed.dtype).T).float()
    return logits.softmax(-1)[:, tokens].sum() / (n_tokens + 1)


class ExtraLoss(ABC):
    """A term that a trainer adds to its loss: `weight * term`.

    Attributes:
        name: under which the trainer logs it.
        weight: lambda.
        scale: what lambda multiplies, one of `SCALES`.
        groups: the names of the groups; a token carries an index into them, or `NO_GROUP`.
        points: where it reads the residual stream.
    """

    name: str
    weight: float
    scale: str
    groups: tuple[str, ...]
    points: tuple[HookPoint, ...]

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        residuals: Mapping[HookPoint, Float[Tensor, "batch seq d_model"]],
        labels: Int[Tensor, "batch seq"],
        groups: Int[Tensor, "batch seq"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """The term's share from one micro-batch; the shares of a step add up to the term."""


@final
class FeatureLoss(ExtraLoss):
    """SASFT's auxiliary loss on the features of an alpha table, summed over layers.

    Only the encoder rows of the chosen features are kept; the SAEs may be let go. Response tokens (label other than
    -100) of samples outside the target group count; those of the target, or without a group, do not.

    Args:
        table: features and thresholds.
        saes: the SAE of every layer used, such as `scope.saes`.
        weight: lambda; the published values are 5e-4 (Gemma-2) and 1e-3 (Llama-3.1), in the scale `published`.
        scale: what lambda multiplies, one of `SCALES`.
        layers: of the table; None for all.
        zero: thresholds of zero instead of alpha (the authors' `same_threshold`).
        enhance: lift the features on samples *of* the target to their mean there, instead of holding them down
            elsewhere.

    Raises:
        MismatchError: the table was made with another SAE.
        NotFoundError: the table lacks a layer, or no such scale.
        InputError: a weight below zero, a feature that does not exist, or both variants at once.
    """

    def __init__(
        self,
        table: AlphaTable,
        saes: SAEsByLayer,
        *,
        weight: float,
        scale: str = "mean",
        layers: Sequence[int] | None = None,
        zero: bool = False,
        enhance: bool = False,
    ) -> None:
        check_scale(weight, scale)
        if zero and enhance:
            raise InputError("a threshold of zero is for holding features down; it can't be joined with enhance")
        self.name, self.weight, self.scale = "feature_loss", weight, scale
        self.groups, self.enhance = table.groups, enhance
        self.target = self.groups.index(table.target)
        self._rows: dict[HookPoint, tuple[Tensor, Tensor, Tensor]] = {}
        for layer in sorted({one.layer for one in table.layers} if layers is None else set(layers)):
            entry, sae = table.layer(layer), saes[layer]
            table.check_sae(layer, sae)
            chosen = torch.tensor(entry.features)
            if bool((chosen < 0).any() or (chosen >= sae.d_sae).any()):
                raise InputError(f"the alpha table names a feature beyond the {sae.d_sae} of layer {layer}")
            chosen = chosen.to(sae.device)
            alpha = torch.tensor([entry.alpha[group] for group in self.groups])
            alpha = torch.zeros_like(alpha) if zero else alpha
            W, b = sae.W_enc[chosen].detach().float().clone(), sae.b_enc[chosen].detach().float().clone()
            self._rows[HookPoint.read_by(sae.hook_point, layer)] = (W, b, alpha)
        self.points = tuple(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of everything it keeps."""
        return sum(t.numel() * t.element_size() for rows in self._rows.values() for t in rows)

    def counted(self, labels: Int[Tensor, "batch seq"], groups: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
        """The tokens that are held to their thresholds."""
        response = labels != IGNORED
        if self.enhance:
            return response & (groups == self.target)
        return response & (groups != self.target) & (groups != NO_GROUP)

    def __call__(
        self,
        model: nn.Module,
        residuals: Mapping[HookPoint, Float[Tensor, "batch seq d_model"]],
        labels: Int[Tensor, "batch seq"],
        groups: Int[Tensor, "batch seq"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """The auxiliary loss of one micro-batch, not yet weighted."""
        counted = self.counted(labels, groups)
        total = torch.zeros((), device=labels.device)
        for point, rows in self._rows.items():
            h = residuals[point]
            W, b, alpha = rows[0].to(h.device), rows[1].to(h.device), rows[2].to(h.device)
            self._rows[point] = (W, b, alpha)
            here = counted.to(h.device)
            thresholds = alpha[groups.to(h.device)[here]]
            total = total + feature_loss(h[here], W, b, thresholds, n_tokens, enhance=self.enhance).to(total.device)
        return total


@final
class TokenPenalty(ExtraLoss):
    """The baseline: lowers the probability of the target's own tokens in samples outside the target.

    Args:
        table: the target, its groups, and the ids of its tokens.
        model: to know its last layer.
        weight: lambda.   scale: what it multiplies, one of `SCALES`.

    Raises:
        NotFoundError: the table lists no token, or no such scale.   InputError: a weight below zero.
    """

    def __init__(self, table: AlphaTable, model: PreTrainedModel, *, weight: float, scale: str = "mean") -> None:
        check_scale(weight, scale)
        if not table.tokens:
            raise NotFoundError(f"the alpha table lists no token that is the target's own ({table.target})")
        self.name, self.weight, self.scale, self.groups = "token_penalty", weight, scale, table.groups
        self.target, self.points = self.groups.index(table.target), (HookPoint(n_layers(model) - 1),)
        self.tokens = torch.tensor(table.tokens)

    def __call__(
        self,
        model: nn.Module,
        residuals: Mapping[HookPoint, Float[Tensor, "batch seq d_model"]],
        labels: Int[Tensor, "batch seq"],
        groups: Int[Tensor, "batch seq"],
        n_tokens: int,
    ) -> Float[Tensor, ""]:
        """The penalty of one micro-batch, not yet weighted."""
        h = residuals[self.points[0]][:, :-1]
        counted = (labels != IGNORED) & (groups != self.target) & (groups != NO_GROUP)
        here = counted[:, 1:].to(h.device)
        return token_loss(h[here], final_norm(model), unembedding(model), self.tokens.to(h.device), n_tokens)
