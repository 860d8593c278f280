"""What a language model loses when reconstructions take the residual's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen_scope.model import HookPoint, changing, input_device, text_config
from qwen_scope.report import Progress
from qwen_scope.sae import SAE, in_float64

from .parallel import ALONE, Ranks

# Bytes of logits that are held at a time, a few times: `LOGITS` of memory.py.
LOGIT_BYTES = 2**28


@dataclass(frozen=True)
class SplicedLoss:
    """Next-token loss with one layer's residual replaced at every position that counts, in nats per token.

    Attributes:
        ce_clean: of the untouched model.   ce_spliced: with the reconstruction.   ce_zero: with zeros.
        ce_recovered: `(ce_zero - ce_spliced) / (ce_zero - ce_clean)`: 1 is no loss, 0 no better than zeros; sae_lens'
            `ce_loss_score`.
        kl: mean KL divergence of the spliced from the clean prediction, over all positions.
        kl_zero: the same with zeros.
    """

    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_recovered: float
    kl: float
    kl_zero: float = float("nan")

    @property
    def kl_recovered(self) -> float:
        """`(kl_zero - kl) / kl_zero`: 1 is no divergence, 0 that of zeros; SAEBench's `kl_div_score`."""
        return (self.kl_zero - self.kl) / self.kl_zero if self.kl_zero else float("nan")


@torch.no_grad()
def spliced_losses(
    model: nn.Module,
    saes: Mapping[HookPoint, SAE],
    rows: Sequence[Tensor],
    *,
    kept: Callable[[HookPoint, Tensor, Tensor], Tensor] | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[HookPoint, SplicedLoss]:
    """Measure each layer on its own: all other layers run untouched.

    Args:
        rows: batches of full rows of token ids, `(rows, row)`, at least two tokens long.
        kept: from a layer, ids and residuals, where the residual is replaced; by default everywhere.
        ranks: as `evaluate_saes`.
    """
    sums = {point: torch.zeros(5, dtype=torch.float64) for point in saes}
    pieces = list(small_batches(model, ranks.batches_of(rows)))
    with ranks.together():
        add_losses(sums, model, saes, pieces, kept, progress)
    counts = ranks.totals({
        "predicted": sum(ids[:, 1:].numel() for ids in pieces), "positions": sum(ids.numel() for ids in pieces)
    })  # fmt: skip
    return {point: result(ranks.over_rows(total), **counts) for point, total in sums.items()}


def add_losses(
    sums: Mapping[HookPoint, Tensor],
    model: nn.Module,
    saes: Mapping[HookPoint, SAE],
    pieces: Sequence[Tensor],
    kept: Callable[[HookPoint, Tensor, Tensor], Tensor] | None,
    progress: Progress | None,
) -> None:
    """Add clean, spliced and zeroed loss and both divergences over some rows."""
    for number, ids in enumerate(pieces, 1):
        clean = log_probs(model, ids)
        shares = clean.exp()
        for point, sae in saes.items():

            def replaced(h: Tensor, by: Tensor, point: HookPoint = point, ids: Tensor = ids) -> Tensor:
                return by.to(h) if kept is None else torch.where(kept(point, ids, h)[..., None], by.to(h), h)

            with changing(model, {point: lambda h, _, sae=sae, put=replaced: put(h, sae.decode(sae.encode(h)))}):
                spliced = log_probs(model, ids)
            with changing(model, {point: lambda h, _, put=replaced: put(h, torch.zeros_like(h))}):
                zeroed = log_probs(model, ids)
            losses = [summed_loss(each, ids) for each in (clean, spliced, zeroed)]
            diverged = [summed(one.neg_().add_(clean).mul_(shares).sum(-1)) for one in (spliced, zeroed)]
            sums[point].add_(torch.tensor([*losses, *diverged], dtype=torch.float64))
        if progress:
            progress("loss", number / len(pieces), f"{number} of {len(pieces)}")


def result(total: Tensor, predicted: int, positions: int) -> SplicedLoss:
    """Means from the sums of clean, spliced and zeroed loss and of both divergences."""
    clean, spliced, zero = (float(each) / max(1, predicted) for each in total[:3])
    recovered = (zero - spliced) / (zero - clean) if zero != clean else float("nan")
    divergences = (float(each) / max(1, positions) for each in total[3:])
    return SplicedLoss(clean, spliced, zero, recovered, *divergences)


def small_batches(model: nn.Module, rows: Sequence[Tensor]) -> Iterator[Tensor]:
    """The rows in batches whose logits fit the budget."""
    width = text_config(model).vocab_size
    for ids in rows:
        yield from ids.split(max(1, LOGIT_BYTES // (4 * width * ids.shape[1])))


def log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities of every next token, `(rows, row, vocabulary)` in float32: with a vocabulary of 150,000 float64
    would take longer than the model."""
    logits = model(input_ids=ids.to(input_device(model)), use_cache=False).logits
    return torch.log_softmax(logits.float(), dim=-1)


def summed_loss(log_p: Tensor, ids: Tensor) -> float:
    """The cross entropy of all predicted tokens together."""
    wanted = ids[:, 1:].to(log_p.device)
    return -summed(log_p[:, :-1].gather(-1, wanted[..., None]))


def summed(per_token: Tensor) -> float:
    """The sum in float64, so that it does not depend on how many tokens came before."""
    return float(in_float64(per_token).sum())
