"""How good a dictionary is on a language model: reconstruction, sparsity, and what the model loses by it.

Sums are kept in float64. Two definitions of explained variance are in use, and both are given:

- `explained_variance = 1 - sum |x - x_hat|^2 / sum |x - mean|^2` over all tokens, which is `1 - FVU`; sae_lens'
  `explained_variance`. Tokens of large norm count more.
- `explained_variance_per_token`: the mean over tokens of `1 - |x - x_hat|^2 / |x - mean|^2`. Every token counts the
  same. sae_lens' `explained_variance_legacy` is this figure with the mean of each evaluated batch in the place of
  `mean`: the two are equal where all tokens are one batch. With several, the legacy one is as a rule lower, since a
  batch's own mean lies closer to its tokens, and it depends on how the tokens are cut into batches.

`mean` is that of all evaluated tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.model import HookPoint, capture, d_model
from qwen_scope.report import Progress
from qwen_scope.sae import SAE, in_float64
from qwen_scope.text import REASONS, Counted
from qwen_scope.text import tally as tally_of

from .parallel import ALONE, Ranks
from .splice import SplicedLoss, spliced_losses

DENSITY_EDGES = tuple(-6 + 0.25 * i for i in range(25))


@dataclass(frozen=True)
class Reconstruction:
    """How well one SAE reconstructs, and with how much.

    Attributes:
        tokens: evaluated tokens.   left_out: tokens that do not count, which were not looked at.
        fvu: fraction of variance unexplained, all tokens.
        fvu_without_first: the same without the first token of each row, against the mean of those that are left.
        explained_variance, explained_variance_per_token: the two definitions at the top of this file.
        cosine: mean cosine of residual and reconstruction.
        l0: active features per token.
        dead: share of features that fired on no token; it falls as more tokens are looked at.
        density: how many features fire on a share of tokens between `10**edge` and `10**next_edge`, for the edges
            -6, -5.75, ..., 0; rarer ones count in the first, features that never fire in none.
        reasons: how many tokens counted, and how many were left out for which of `text.REASONS`; `text.summary` says
            it in a line.
    """

    tokens: int
    left_out: int
    fvu: float
    fvu_without_first: float
    explained_variance: float
    explained_variance_per_token: float
    cosine: float
    l0: float
    dead: float
    density: tuple[int, ...]
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Quality:
    """Everything that is measured of one layer: `reconstruction`, and `loss` unless it was left out."""

    reconstruction: Reconstruction
    loss: SplicedLoss | None

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self.reconstruction), **(asdict(self.loss) if self.loss else {})}


class Moments:
    """Count and sum of vectors, in float64."""

    def __init__(self, width: int) -> None:
        self.n, self.sum = 0, torch.zeros(width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        self.n, self.sum = self.n + len(x), self.sum + in_float64(x).sum(0).cpu()

    def over(self, ranks: Ranks) -> None:
        """Become those of all ranks."""
        self.n, self.sum = ranks.totals({"n": self.n})["n"], ranks.over_rows(self.sum)

    @property
    def mean(self) -> Tensor:
        return self.sum / max(1, self.n)


def evaluate_residuals(sae: SAE, residuals: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> Reconstruction:
    """Measure one SAE on residuals that can be gone through twice, first for their mean.

    Args:
        residuals: gives batches of residuals `(n, d_model)` and which rows are first tokens `(n,)` bool.

    Raises:
        InputError: there are no residuals.
    """
    every, later = Moments(sae.d_model), Moments(sae.d_model)
    for x, first in residuals():
        every.add(x)
        later.add(x[~first])
    if not every.n:
        raise InputError("there are no residuals to evaluate on")
    tally = Tally(sae, every.mean, later.mean, every.n)
    for x, first in residuals():
        tally.add(x, first)
    return tally.result()


class Tally:
    """Sums over tokens of one SAE, with the means known."""

    def __init__(self, sae: SAE, mean: Tensor, mean_later: Tensor, total: int) -> None:
        self.sae, self.mean, self.mean_later, self.of = sae, mean, mean_later, total
        self.error = self.total = self.error_later = self.total_later = self.unexplained = self.cosine = 0.0
        self.tokens = self.active = 0
        self.fired = torch.zeros(sae.d_sae, dtype=torch.int64)

    def add(self, x: Tensor, first: Tensor) -> None:
        """Encode and decode a batch, and add what it shows."""
        acts = self.sae.encode(x)
        exact, x_hat = x.cpu().double(), self.sae.decode(acts).cpu().double()
        first = first.cpu()
        error = (exact - x_hat).square().sum(1)
        total = (exact - self.mean).square().sum(1)
        self.error += float(error.sum())
        self.total += float(total.sum())
        self.error_later += float(error[~first].sum())
        self.total_later += float((exact[~first] - self.mean_later).square().sum())
        self.unexplained += float((error / total).sum())
        self.cosine += float(torch.cosine_similarity(exact, x_hat, dim=1).sum())
        active = acts.indices[acts.values > 0].long().cpu()
        self.active += len(active)
        self.fired += torch.bincount(active, minlength=self.sae.d_sae)
        self.tokens += len(x)

    def over(self, ranks: Ranks) -> None:
        """Become those of all ranks."""
        sums, counts = ("error", "total", "error_later", "total_later", "unexplained", "cosine"), ("tokens", "active")
        found = ranks.over_rows(torch.tensor([getattr(self, name) for name in sums], dtype=torch.float64)).tolist()
        whole = ranks.totals({name: getattr(self, name) for name in counts})
        for name, value in {**dict(zip(sums, found, strict=True)), **whole}.items():
            setattr(self, name, value)
        self.fired = ranks.over_rows(self.fired)

    def result(self) -> Reconstruction:
        """The figures."""
        fvu = self.error / self.total
        shares = self.fired[self.fired > 0].double() / self.tokens
        edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
        # The last bin is closed: a feature that fires on every token belongs to it.
        bins = (torch.bucketize(shares.log10(), edges, right=True) - 1).clamp(0, len(edges) - 2)
        return Reconstruction(
            tokens=self.tokens,
            left_out=self.of - self.tokens,
            fvu=fvu,
            fvu_without_first=self.error_later / self.total_later if self.total_later else float("nan"),
            explained_variance=1 - fvu,
            explained_variance_per_token=1 - self.unexplained / self.tokens,
            cosine=self.cosine / self.tokens,
            l0=self.active / self.tokens,
            dead=float((self.fired == 0).double().mean()),
            density=tuple(torch.bincount(bins, minlength=len(edges) - 1).tolist()),
        )


def evaluate_saes(
    model: nn.Module,
    saes: Mapping[HookPoint, SAE],
    rows: Sequence[Tensor],
    *,
    loss: bool = True,
    counted: Counted = Counted(),  # noqa: B008 - frozen
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[HookPoint, Quality]:
    """Measure SAEs on a language model, all layers from the same tokens.

    Args:
        rows: batches of full rows of token ids, `(rows, row)`; gone through twice.
        loss: also measure what the model's predictions lose when the reconstruction takes the residual's place.
        counted: which tokens count; no SAE reads the others, and their residuals stay as they are. By default the first
            token of each row is left out alone; `measure_counted` of room `model` also finds special tokens and sinks.
        progress: called with the stage, its share done (0 to 1) and a short text.
        ranks: with `data`, all of its processes call this with the same, each reads its batches, and all get the
            figures of all batches: counts are those of one process, sums differ in their last digits.

    Raises:
        InputError: no SAE or no tokens.   MismatchError: an SAE of another width than the model.
        NotFoundError: a layer that the model does not have, or for which `counted` has no threshold.
    """
    report = progress or (lambda stage, share, text: None)
    layers = {str(point): sae for point, sae in saes.items()}
    every, later = ({name: Moments(sae.d_model) for name, sae in layers.items()} for _ in range(2))
    found: dict[str, Mapping[str, int]] = {name: dict.fromkeys(REASONS, 0) for name in layers}
    mine = ranks.batches_of(rows)
    with ranks.together():
        check_pairing(model, saes, rows)
        for number, ids in enumerate(mine, 1):
            for point, h in capture(model, ids, list(saes)).items():
                name, reasons = str(point), counted.reasons(ids, sinks=counted.sinks(h, point))
                x, first = counting(h, reasons)
                every[name].add(x)
                later[name].add(x[~first])
                found[name] = {reason: found[name][reason] + n for reason, n in tally_of(reasons).items()}
            report("means", number / len(mine), f"{number} of {len(mine)}")
    for moments in (*every.values(), *later.values()):
        moments.over(ranks)
    found = {name: ranks.totals(counts) for name, counts in found.items()}
    if empty := [name for name, moments in every.items() if not moments.n]:
        raise InputError(f"every token at {empty[0]} is left out; there is nothing to measure")
    total = sum(ids.numel() for ids in rows)
    tallies = {name: Tally(sae, every[name].mean, later[name].mean, total) for name, sae in layers.items()}
    with ranks.together():
        for number, ids in enumerate(mine, 1):
            for point, h in capture(model, ids, list(saes)).items():
                tallies[str(point)].add(*counting(h, counted.reasons(ids, sinks=counted.sinks(h, point))))
            report("reconstruction", number / len(mine), f"{number} of {len(mine)}")
    for tally in tallies.values():
        tally.over(ranks)

    def kept(point: HookPoint, ids: Tensor, h: Tensor) -> Tensor:
        return counted.keep(h, point, ids)

    losses = spliced_losses(model, saes, rows, kept=kept, progress=report, ranks=ranks) if loss else {}
    return {
        point: Quality(replace(tallies[str(point)].result(), reasons=found[str(point)]), losses.get(point))
        for point in saes
    }


def counting(h: Tensor, reasons: Tensor) -> tuple[Tensor, Tensor]:
    """The residuals that count, `(n, d_model)`, and which of them are first tokens of rows, `(n,)` bool.

    Args:
        h: `(rows, row, d_model)`.   reasons: 0 for a token that counts, `(rows, row)`.
    """
    here = (reasons == 0).to(h.device)
    first = torch.zeros_like(here)
    first[:, 0] = True
    return h[here], first[here]


def check_pairing(model: nn.Module, saes: Mapping[HookPoint, SAE], rows: Sequence[Tensor]) -> None:
    """Raise InputError or MismatchError unless these SAEs can be measured on this model and these tokens."""
    if not saes:
        raise InputError("there is no SAE to evaluate")
    if not rows or not sum(ids.numel() for ids in rows):
        raise InputError("there are no tokens to evaluate on")
    width = d_model(model)
    for point, sae in saes.items():
        if sae.d_model != width:
            raise MismatchError(f"the SAE of {point} reads {sae.d_model} dimensions, but the model has {width}")
