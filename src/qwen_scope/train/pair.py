"""SAEs on two checkpoints, or on one alone: sums over the same tokens, by document and phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.model import HookPoint, capture, changing, d_model, input_device, text_config
from qwen_scope.report import Progress
from qwen_scope.sae import SAE, FeatureActs
from qwen_scope.text import Counted

from .evaluate import Moments, check_pairing
from .moves import MoveSums
from .pair_rows import DocumentRows, units
from .parallel import ALONE, Ranks
from .splice import LOGIT_BYTES

SUMS = (
    "tokens",
    "error_base",
    "total_base",
    "error_post",
    "total_post",
    "jaccard",
    "cosine_base",
    "cosine_post",
    "cosine",
)
"""What is summed over the tokens that count on both checkpoints; squared distances are from the mean of all of them.

Besides, `within_base` and `within_post`: squared distances from the mean of the token's own phase; and over predicted
tokens `predicted` and the losses `clean`, `spliced` and `zero` of both, and `mean_post`, in nats."""

BASE, POST = "base", "post"


@dataclass(frozen=True, eq=False)
class PairSums:
    """One layer's sums.

    Attributes:
        units: document and phase of each unit, `(units, 2)`.
        columns: by name, `(units,)` float64.
        moves: what is summed of single features; None without a base.
    """

    units: np.ndarray
    columns: Mapping[str, np.ndarray]
    moves: MoveSums | None

    def by_document(self, phase: int | None = None) -> dict[str, np.ndarray]:
        """The columns summed over all tokens of each document, or over those of one phase, `(documents,)`.

        Distances are from the mean of the phase where one is asked for.
        """
        chosen = np.ones(len(self.units), bool) if phase is None else self.units[:, 1] == phase
        numbers, place = np.unique(self.units[chosen, 0], return_inverse=True)
        found = {
            name: np.bincount(place, values[chosen], minlength=len(numbers)) for name, values in self.columns.items()
        }
        if phase is not None:
            found |= {
                f"total_{which}": found[f"within_{which}"] for which in (BASE, POST) if f"within_{which}" in found
            }
        return found

    @property
    def phases(self) -> list[int]:
        """The phases that tokens have, as indices into `PHASES`."""
        return sorted({int(phase) for phase in self.units[:, 1]})


def measure_pair(
    base: nn.Module | None,
    post: nn.Module,
    saes: Mapping[HookPoint, SAE],
    rows: Sequence[DocumentRows],
    *,
    counted: Counted,
    counted_post: Counted,
    loss: bool = True,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[HookPoint, PairSums]:
    """Sums of SAEs over the same tokens of two models, or of `post` alone.

    Args:
        base: the model that the SAEs are for, if it is at hand.
        counted: which tokens count on the base, by place, id, phase and its own thresholds.
        counted_post: the same of the other model; a token that is left out on either one counts on neither.
        loss: also the next-token losses of both, with zeros and reconstructions in the residuals' place, and on `post`
            with their mean.
        ranks: as `evaluate_saes`.

    Raises:
        InputError: no SAE, no rows, or no token that counts on both.
        MismatchError: models of different widths or an SAE that does not fit them.
    """
    with ranks.together():
        check_pairing(post, saes, [one.ids for one in rows])
        if base is not None and d_model(base) != d_model(post):
            raise MismatchError(
                f"the models have {d_model(base)} and {d_model(post)} dimensions; SAEs move between equals"
            )
    models = {POST: post} if base is None else {BASE: base, POST: post}
    report = progress or (lambda stage, share, text: None)
    work = Pair(models, saes, rows, {BASE: counted, POST: counted_post}, report, ranks)
    work.find_means()
    work.compare()
    if loss:
        work.lose()
    work.add_up()
    return {point: PairSums(work.units, work.columns[point], work.moves.get(point)) for point in saes}


class Pair:
    """What is known while two models are measured."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        saes: Mapping[HookPoint, SAE],
        rows: Sequence[DocumentRows],
        counted: Mapping[str, Counted],
        report: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self.models, self.saes, self.counted, self.report, self.ranks = models, saes, counted, report, ranks
        of_token, self.units = units(rows)
        # Units are those of all batches, the batches those of this rank.
        self.rows, self.of_token = ranks.batches_of(rows), ranks.batches_of(of_token)
        # Per batch and layer, the tokens that count on every model.
        self.keep: list[dict[HookPoint, Tensor]] = []
        both = [(point, which) for point in saes for which in models]
        self.means = {one: Moments(saes[one[0]].d_model) for one in both}
        phases = np.unique(self.units[:, 1]).tolist()
        self.within = {(*one, phase): Moments(saes[one[0]].d_model) for one in both for phase in phases}
        self.columns: dict[HookPoint, dict[str, np.ndarray]] = {point: {} for point in saes}
        self.moves = {point: MoveSums(sae.d_sae) for point, sae in saes.items()} if BASE in models else {}

    def residuals(self, stage: str) -> Iterator[tuple[int, DocumentRows, dict[str, dict[HookPoint, Tensor]]]]:
        """Every batch with what all models have at every layer."""
        for number, one in enumerate(self.rows):
            yield (
                number,
                one,
                {which: capture(model, one.ids, list(self.saes), one.mask) for which, model in self.models.items()},
            )
            self.report(stage, (number + 1) / len(self.rows), f"{number + 1} of {len(self.rows)}")

    def find_means(self) -> None:
        """Which tokens count, and the mean of their residuals, of all and of each phase."""
        with self.ranks.together():
            for _, one, found in self.residuals("means"):
                keep = {point: self.kept(one, point, found) for point in self.saes}
                self.keep.append(keep)
                for which, by_point in found.items():
                    for point, h in by_point.items():
                        here = keep[point]
                        for phase in one.phases[here].unique().tolist():
                            some = h[(here & (one.phases == phase)).to(h.device)]
                            self.means[point, which].add(some)
                            self.within[point, which, phase].add(some)
        for moments in (*self.means.values(), *self.within.values()):
            moments.over(self.ranks)
        for point in self.saes:
            if not self.means[point, POST].n:
                where = "on one of the models" if BASE in self.models else "on the model"
                raise InputError(f"every token at {point} is left out {where}; there is nothing to compare")

    def kept(self, one: DocumentRows, point: HookPoint, found: Mapping[str, Mapping[HookPoint, Tensor]]) -> Tensor:
        """Which tokens count on every model, `(rows, row)` on the CPU."""
        keep = torch.ones_like(one.mask, dtype=torch.bool)
        for which, by_point in found.items():
            counted, h = self.counted[which], by_point[point]
            keep &= counted.keep(h, point, one.ids, phases=one.phases, mask=one.mask).cpu()
        return keep

    def compare(self) -> None:
        """Errors, distances from the means, active features, and the moves of each feature."""
        with self.ranks.together():
            self._compare()

    def _compare(self) -> None:
        for number, one, found in self.residuals("transfer"):
            for point, sae in self.saes.items():
                keep = self.keep[number][point]
                unit, phase = self.of_token[number][keep], one.phases[keep]
                sums: dict[str, Tensor] = {"tokens": torch.ones(len(unit), dtype=torch.float64)}
                acts: dict[str, FeatureActs] = {}
                exact: dict[str, Tensor] = {}
                for which, by_point in found.items():
                    h = by_point[point]
                    x = h[keep.to(h.device)]
                    acts[which] = sae.encode(x.to(sae.device)).to("cpu")
                    x_hat, x = sae.decode(acts[which].to(sae.device)).cpu().double(), x.cpu().double()
                    exact[which] = x
                    sums[f"error_{which}"] = (x - x_hat).square().sum(-1)
                    sums[f"total_{which}"] = (x - self.means[point, which].mean).square().sum(-1)
                    sums[f"within_{which}"] = self.from_phase(point, which, x, phase)
                    sums[f"cosine_{which}"] = torch.cosine_similarity(x, x_hat, dim=-1)
                if BASE in acts:
                    sums["jaccard"] = jaccard(acts[BASE], acts[POST])
                    sums["cosine"] = torch.cosine_similarity(exact[BASE], exact[POST], dim=-1)
                    documents = one.documents[:, None].expand_as(one.ids)[keep]
                    self.moves[point].add(acts[BASE], acts[POST], documents)
                for name, values in sums.items():
                    self.add(point, name, unit, values)

    def from_phase(self, point: HookPoint, which: str, x: Tensor, phase: Tensor) -> Tensor:
        """Squared distances from the mean of each token's phase."""
        out = torch.zeros(len(x), dtype=torch.float64)
        for one in phase.unique().tolist():
            here = phase == one
            out[here] = (x[here] - self.within[point, which, one].mean).square().sum(-1)
        return out

    def lose(self) -> None:
        """Next-token losses of every model, untouched and with each layer replaced."""
        with self.ranks.together():
            self._lose()

    def _lose(self) -> None:
        for number, one in enumerate(self.rows):
            target = (one.mask[:, 1:] == 1) & (one.mask[:, :-1] == 1)
            unit = self.of_token[number][:, 1:][target]
            for which, model in self.models.items():
                clean = token_losses(model, one)[target]
                for point in self.saes:
                    keep = self.keep[number][point]
                    self.add(point, f"clean_{which}", unit, clean)
                    for name, put in self.replacements(point, which).items():
                        self.add(point, f"{name}_{which}", unit, token_losses(model, one, point, keep, put)[target])
            for point in self.saes:
                self.add(point, "predicted", unit, torch.ones(len(unit), dtype=torch.float64))
            self.report("loss", (number + 1) / len(self.rows), f"{number + 1} of {len(self.rows)}")

    def replacements(self, point: HookPoint, which: str) -> dict[str, Any]:
        """What takes the place of residuals `(n, d_model)`, by name."""
        sae, mean = self.saes[point], self.means[point, which].mean
        put = {
            "spliced": lambda x: sae.decode(sae.encode(x.to(sae.device))),
            "zero": torch.zeros_like,
        }
        return put | ({"mean": lambda x: mean.to(x.device, torch.float32).expand(len(x), -1)} if which == POST else {})

    def add_up(self) -> None:
        """The sums of all ranks; one that had no batch has no columns yet."""
        names = self.ranks.names_of(list(next(iter(self.columns.values()))))
        nothing = np.zeros(len(self.units))
        for point, found in self.columns.items():
            self.columns[point] = {name: self.ranks.sum_of(found.get(name, nothing)) for name in names}
        for moves in self.moves.values():
            moves.over(self.ranks)

    def add(self, point: HookPoint, name: str, unit: Tensor, values: Tensor) -> None:
        """Values of tokens to their units."""
        found = np.bincount(unit.numpy(), values.cpu().double().numpy(), minlength=len(self.units))
        self.columns[point][name] = self.columns[point].get(name, 0) + found


@torch.no_grad()
def token_losses(
    model: nn.Module, one: DocumentRows, point: HookPoint | None = None, keep: Tensor | None = None, put: Any = None
) -> Tensor:
    """The loss of predicting each token but the first of a row, `(rows, row - 1)` float64 on the CPU; padding is 0.

    Args:
        point, keep, put: where residuals are replaced, of which tokens, and by what, if at all.
    """
    each = max(1, LOGIT_BYTES // (4 * text_config(model).vocab_size * one.ids.shape[1]))
    device, parts = input_device(model), []
    for at in range(0, len(one.ids), each):
        ids, mask = one.ids[at : at + each].to(device), one.mask[at : at + each].to(device)

        def change(h: Tensor, _: HookPoint, at: int = at) -> Tensor:
            if keep is None:
                return h
            here = keep[at : at + each].to(h.device)
            out = h.clone()
            out[here] = put(h[here]).to(h)
            return out

        with nullcontext() if point is None else changing(model, {point: change}):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        wanted = ids[:, 1:].to(logits.device)
        lost = nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none")
        parts.append(lost.reshape(wanted.shape).cpu().double())
    return torch.cat(parts)


def jaccard(a: FeatureActs, b: FeatureActs) -> Tensor:
    """Of each row, the features active in both over those active in either, float64; 1 where neither has any."""
    both = torch.cat([distinct(a, a.width), distinct(b, a.width + a.k)], dim=-1).sort(dim=-1).values
    shared = (both[..., 1:] == both[..., :-1]).sum(-1)
    either = a.active() + b.active() - shared
    return torch.where(either > 0, shared / either.clamp(min=1).double(), 1.0)


def distinct(acts: FeatureActs, unused: int) -> Tensor:
    """The active features, and in unused slots numbers that nothing else has."""
    spare = torch.arange(unused, unused + acts.k, device=acts.indices.device)
    return torch.where(acts.values > 0, acts.indices.long(), spare)
