"""The training loop. `examples/train_flat.py` is the same in sixty flat lines, for reading."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError, brief
from qwen_scope.model import HookPoint
from qwen_scope.sae import SAE
from qwen_scope.text import Counted

from . import checkpoint
from .checkpoint import Checkpoints, RunState
from .config import SCRATCH, Plan, TrainConfig, hook_of
from .parallel import Ranks
from .step import DivergedError, Layer, LayerReport, start, step
from .weights import exported

Residuals = Iterable[Mapping[str, Tensor]]


@runtime_checkable
class Resumable(Protocol):
    """Residuals that know where they are: a fresh copy after `seek(cursor())` goes on with the same batches.

    `seek` comes before the first batch is taken.
    """

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]: ...
    def cursor(self) -> dict[str, Any]: ...
    def seek(self, cursor: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """What one step of the run says.

    Attributes:
        step: counted from 1.   steps: of the whole run.
        tokens: tokens seen so far, over all ranks, sinks included.
        seconds: of training, over all parts of the run.
        tokens_per_s: since the run started or was resumed.
        lr: the learning rate of this step.
        layers: what each layer of this rank says.
    """

    step: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    lr: float
    layers: Mapping[str, LayerReport]

    def line(self) -> str:
        """Loss, FVU, L0 and dead share, averaged over the layers of the run, and the speed."""
        layers = [layer for name, layer in self.layers.items() if not name.startswith(SCRATCH)]

        def mean(name: str) -> float:
            return sum(float(getattr(layer, name)) for layer in layers) / len(layers)

        speed = self.tokens / max(self.seconds, 1e-9)
        figures = f"loss {mean('loss'):.3f}  FVU {mean('fvu'):.3f}  L0 {mean('l0'):.0f}  dead {mean('dead'):.1%}"
        return f"{figures}  {speed:,.0f} tokens/s"


def train(
    config: TrainConfig,
    residuals: Residuals,
    *,
    init: Mapping[str, SAE] | None = None,
    checkpoints: Checkpoints | None = None,
    journals: Sequence[Callable[[StepReport], None]] = (),
    callbacks: Sequence[Callable[[StepReport], None]] = (),
    group: str = "trained",
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    device: torch.device | str | None = None,
    counted: Counted | None = None,
    facts: Mapping[str, Any] | None = None,
    scratch: TrainConfig | None = None,
) -> dict[str, SAE]:
    """Train one SAE per hook point, all on the same batches.

    Args:
        residuals: batches of raw residuals, `(batch, d_model)` per hook point such as `layers.3.resid_post`; in
            data-parallel training this rank's share, with layers divided among ranks this rank's layers
            (`ranks.owned(names)`). A `Resumable` source is checkpointed with its cursor; another is
            advanced by as many batches as the run had seen.
        init: finished SAEs to continue from, for all layers or none; `TrainConfig.continuing` has defaults for that.
        checkpoints: where and how often the run is saved; None saves nothing.
        journals: called after every step, on every rank, before the step may be saved: so a checkpoint never counts a
            step that they don't hold.
        callbacks: called after every step, on every rank, when it is saved.
        group: the name of the set that the SAEs will belong to.
        ranks: how the run is divided among processes.
        device: where the SAEs are trained; None means where the residuals are.
        counted: which tokens count, as `measure_counted` of room `model` gives it: sinks by the threshold of their
            layer are left out, and the SAEs say so. The residuals themselves have neither place nor id, so whoever
            gives them leaves out first and special tokens (`ResidualBuffer` does). None trains on all that are given.
        facts: what else the SAEs' `meta` is to say.
        scratch: how to train from scratch, beside each SAE that is continued, another one on the same batches; it is
            called `scratch:` and the hook point.

    Returns:
        The SAEs by hook point, on the CPU, reading the raw residual; with layers divided among ranks, this rank's.

    Raises:
        InputError: the residuals end before the run does or come in other batches than the config says, a checkpoint
            can't be written, or `scratch` comes without `init` or is of other batches.
        DivergedError: a loss or a residual is not finite; the message names step, layer and batch.
        MismatchError: `init` or a checkpoint does not belong to this run.
    """
    batches = iter(residuals)
    facts = {**({} if counted is None else {"counted": counted.to_json()}), **(facts or {})}
    counted = Counted.everything() if counted is None else counted
    plan = Plan(config, scratch)
    state = begin(plan, residuals, batches, checkpoints, ranks, device, counted)
    began, before, earlier = time.monotonic(), state.step, state.seconds
    while state.step < config.steps:
        batch = {str(name): x for name, x in next(batches, {}).items()}
        check_batch(config, batch, state, ranks)
        if not state.layers:
            state.layers = first_layers(plan, batch, init or {}, checkpoints, ranks, device, counted)
        lr = config.lr_at(state.step)
        reports = {}
        for name, layer in state.layers.items():
            own = plan.of(name)
            try:
                reports[name] = step(own, layer, batch[hook_of(name)], own.lr_at(state.step), ranks, counted)
            except DivergedError as error:
                raise DivergedError(where_diverged(str(error), state, residuals, checkpoints)) from error
        state.step += 1
        seconds = time.monotonic() - began
        speed = (state.step - before) * config.batch / max(seconds, 1e-9)
        state.seconds = earlier + seconds
        report = StepReport(state.step, config.steps, state.step * config.batch, state.seconds, speed, lr, reports)
        for journal in journals:
            journal(report)
        if checkpoints and (state.step % checkpoints.every == 0 or state.step == config.steps):
            state.cursor = residuals.cursor() if isinstance(residuals, Resumable) else None
            state.rng = checkpoint.rng_now()
            checkpoint.save(state, plan, checkpoints, ranks)
        for callback in callbacks:
            callback(report)
    # One after the other, so that a layer's optimiser is gone before the next layer's weights are copied.
    return {name: finish(plan.of(name), state.layers.pop(name), group, ranks, facts) for name in list(state.layers)}


def begin(
    plan: Plan, residuals: Residuals, batches: Iterator[Any], checkpoints: Checkpoints | None,
    ranks: Ranks, device: torch.device | str | None, counted: Counted,
) -> RunState:  # fmt: skip
    """A new state, or that of the latest checkpoint with the residuals moved to where it left off."""
    ranks.slice_of(plan.config.d_sae)
    if checkpoints is None:
        return RunState(counted=counted)
    checkpoints.prepare()
    if not checkpoints.resume or checkpoints.latest() is None:
        return RunState(counted=counted)
    state = checkpoint.load(plan, checkpoints, ranks, device, counted)
    checkpoint.restore_rng(state.rng)
    if isinstance(residuals, Resumable) and state.cursor is not None:
        residuals.seek(state.cursor)
    else:
        for _ in range(state.step):
            next(batches, None)
    return state


def check_batch(config: TrainConfig, batch: Mapping[str, Tensor], state: RunState, ranks: Ranks) -> None:
    """Raise InputError or MismatchError unless the batch is what the config and the first batch promised."""
    if not batch:
        raise InputError(f"the residuals ended after {state.step} of {config.steps} steps; lower tokens or add text")
    share = ranks.share_of(config.batch)
    for name, x in batch.items():
        if x.ndim != 2 or len(x) != share:
            raise InputError(
                f"the residuals of {name} come as {tuple(x.shape)}; the config asks for {share} rows at a time"
            )
    if missing := [name for name in map(hook_of, state.layers) if name not in batch]:
        raise MismatchError(
            f"the residuals have no {', '.join(missing)}, which this run trains; they have {', '.join(batch)}"
        )


def first_layers(
    plan: Plan, batch: Mapping[str, Tensor], init: Mapping[str, SAE], checkpoints: Checkpoints | None,
    ranks: Ranks, device: torch.device | str | None, counted: Counted,
) -> dict[str, Layer]:  # fmt: skip
    """The layers of this rank before their first step; bad names, sizes and a full disk are found here."""
    for name in batch:
        HookPoint.parse(name)
    init = {str(name): sae for name, sae in init.items()}
    if plan.scratch is not None and not init:
        raise InputError("SAEs are trained from scratch beside SAEs that are continued; name those to continue from")
    if init and (differ := sorted(set(init) ^ set(batch))):
        raise MismatchError(f"the SAEs to continue from and the residuals differ in {', '.join(differ)}")
    for name, sae in init.items():
        if sae.hook_point is not None and HookPoint.parse(sae.hook_point) != HookPoint.parse(name):
            raise MismatchError(f"the SAE to continue from at {name} reads {sae.hook_point}")
    here = {name: x.to(device, torch.float32) for name, x in batch.items()}
    layers = {name: start(plan.config, name, x, ranks, init.get(name), counted) for name, x in here.items()}
    if plan.scratch is not None:
        beside = {SCRATCH + name: start(plan.scratch, name, x, ranks, None, counted) for name, x in here.items()}
        layers |= beside
    if checkpoints:
        parameters = sum(p.numel() for layer in layers.values() for p in layer.weights.parameters().values())
        checkpoints.check_space(3 * 4 * parameters)
    return layers


def where_diverged(what: str, state: RunState, residuals: Residuals, checkpoints: Checkpoints | None) -> str:
    """One sentence: what is not finite, where, and what is left."""
    cursor = f", which ended at {brief(str(residuals.cursor()))}" if isinstance(residuals, Resumable) else ""
    good = checkpoints.latest() if checkpoints else None
    left = f"the last good checkpoint is {good}" if good else "there is no checkpoint to go back to"
    return f"{what} at step {state.step + 1} (batch {state.step + 1} of the residuals{cursor}); {left}"


def finish(config: TrainConfig, layer: Layer, group: str, ranks: Ranks, facts: Mapping[str, Any]) -> SAE:
    """The SAE of a trained layer."""
    meta = {"training": config.to_json(), "tokens": layer.tokens, "sinks_dropped": layer.dropped, **facts}
    return config.kind.export(exported(layer.weights, layer.name, group, meta, ranks), config.shape)
