"""A whole training run, from a model's name and a source of text to a folder that can be shared.

```
out/
  run.json        the resolved config, versions and seed; at the end also how many rows of the text could not be used
  metrics.jsonl   one line per logged step
  checkpoints/    see `checkpoint.py`
  scratch/        SAEs that were trained from scratch beside, in the official layout
  <group>/        the SAEs in the official layout, README.md (the card) and plots/: what is shared
  sae_lens/ ...   exports that were asked for
```
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.files import check_folder, lock_folder, read_object, write_text
from qwen_scope.model import (
    HookPoint,
    LoadedModel,
    context_length,
    load_model,
    measure_counted,
    n_layers,
    weights_fingerprint,
)
from qwen_scope.report import HasFrames, Progress, Table
from qwen_scope.sae import SAE, layers_of, save_sae
from qwen_scope.scope import model_source
from qwen_scope.text import REASONS, Corpus, Counted, TokenRows, longest_text

from .began import (
    Began,
    Moved,
    beginnings,
    check_same_beginning,
    cosines_of,
    history_of,
    with_history,
    write_cosines,
)
from .buffer import ResidualBuffer
from .card import write_card
from .checkpoint import Checkpoints
from .config import SCRATCH, hook_of
from .evaluate import Quality, evaluate_saes
from .held_out import KEY, HeldOut, digest, text_source
from .loop import StepReport, train
from .metrics import JsonlMetrics, TensorBoardMetrics, WandbMetrics
from .options import RESERVED, RUN, SCRATCH_FOLDER, TrainRun, named
from .parallel import ALONE, Ranks, counted_of_first, join


@dataclass(frozen=True, repr=False)
class TrainResult(HasFrames):
    """What a run leaves.

    Attributes:
        folder: the group in the official layout, with its card.
        saes: the SAEs by hook point.
        quality: what was measured, by hook point; empty where nothing was.
        began: what SAEs that were continued began as and how they compare, by hook point.
    """

    folder: Path
    saes: Mapping[str, SAE]
    quality: Mapping[str, Quality]
    began: Mapping[str, Began] = field(default_factory=dict)

    def sheet(self) -> Table:
        """A row per SAE with its figures."""
        rows = [{"hook_point": point, **one.plain()} for point, one in self.quality.items()]
        return Table.of(f"{self.folder.name}: quality", rows or [{"hook_point": point} for point in self.saes])


def run_train(
    run: TrainRun,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train, save, export, measure, and write the card.

    Args:
        on_step: called after every step, on the first rank.
        progress: called with the stage, its share done (0 to 1) and a short text, on the first rank.

    Raises:
        QwenScopeError: with one sentence, before training where the cause can be known before.
    """
    texts = (run.data,) if isinstance(run.data, str) else run.data
    read = [one for one in (*texts, run.start_from, run.model) if one is not None and str(one) != "lab"]
    check_folder(run.out, (*RESERVED, run.name, *run.exports), *read)
    ranks = join(run.parallel)
    # Of several processes of one run the first holds its folder.
    with lock_folder(run.out) if ranks.first else nullcontext():
        return _run(run, ranks, on_step, progress)


def _run(
    run: TrainRun,
    ranks: Ranks,
    on_step: Callable[[StepReport], None] | None,
    progress: Progress | None,
) -> TrainResult:
    checkpoints = Checkpoints(run.out / "checkpoints", run.checkpoint_every, run.keep, run.resume)
    checkpoints.prepare()
    loaded = load_model(model_source(run.model), device=run.device, dtype=run.dtype)
    points = hook_points(run, loaded)
    counted = kept_counted(run, checkpoints) or counted_at_start(run, loaded, ranks)
    source = source_of(run, loaded, ranks.owned([str(point) for point in points]), ranks, counted)
    init = beginnings(run, loaded, points)
    history = {name: history_of(sae, name, run.start_from or "") for name, sae in init.items()}
    journals = journals_of(run, ranks)
    facts = facts_of(run, loaded, counted) | {"began_as": {name: one[-1] for name, one in history.items()}}
    if checkpoints.resume and checkpoints.latest() is not None:
        check_same_beginning(read_object(run.out / RUN).get("began_as", {}), facts["began_as"], run.out)
    if ranks.first:
        write_json(run.out / RUN, facts)
    mine = {name: sae for name, sae in init.items() if name in map(str, source.hook_points)}
    every = train(
        run.config, source, init=mine, checkpoints=checkpoints, journals=journals,
        callbacks=callbacks_of(on_step, progress) if ranks.first else [], group=run.name, ranks=ranks,
        device=loaded.model.device, counted=counted, facts=carried(run, loaded),
        scratch=run.train.anew() if run.against_scratch else None,
    )  # fmt: skip
    every = {name: with_history(sae, hook_of(name), run.model, history.get(name, ())) for name, sae in every.items()}
    saes = {name: sae for name, sae in every.items() if not name.startswith(SCRATCH)}
    scratch = {hook_of(name): sae for name, sae in every.items() if name.startswith(SCRATCH)}
    source.rows.corpus.tell()
    facts["rows_passed_over"] = source.rows.corpus.unused.total()
    read = ranks.over_rows(torch.tensor([source.read[reason] for reason in REASONS], device=loaded.model.device))
    facts["tokens_read"] = dict(zip(REASONS, read.tolist(), strict=True))
    folder = run.out / run.name
    alone = ranks.mode != "layers"
    if ranks.first or not alone:
        save(run, saes, folder, ranks)
        if scratch:
            save_sae(list(scratch.values()), run.out / SCRATCH_FOLDER / run.name, layout="official")
    # Where every process has all SAEs they measure together, each its share of the rows.
    group = ranks if ranks.mode == "data" else ALONE
    here, told = ranks.mode in ("layers", "data") or ranks.first, progress if ranks.first else None
    quality = measured(run, loaded, saes, counted, told, group) if here else {}
    began = compared(run, loaded, saes, init, scratch, history, counted, told, group) if here and init else {}
    plain = {name: quality[name].plain() if quality else {} for name in saes}
    note = {
        name: {**plain[name], "dropped": sae.meta["sinks_dropped"], "trained_on": sae.meta["tokens"]}
        for name, sae in saes.items()
    }
    for name, one in began.items():
        note[name]["began"] = one.plain()
    if ranks.first or not alone:
        write_json(run.out / f"quality.rank{ranks.rank}.json", note)
    ranks.barrier()
    if ranks.first:
        write_json(run.out / RUN, facts)
        finish_folder(run, folder, facts)
    return TrainResult(folder, saes, quality, began)


def kept_counted(run: TrainRun, checkpoints: Checkpoints) -> Counted | None:
    """Which tokens count, as the caller says or, where a run goes on, as it began; None where that is to be measured.

    Raises:
        MismatchError: the run was begun by a version that measured no thresholds.
    """
    if run.counted is not None or not checkpoints.resume or checkpoints.latest() is None:
        return run.counted
    data = read_object(run.out / RUN)
    if data.get("counted") is None:
        raise MismatchError(f"{run.out} was begun by an earlier version; finish the run with that one")
    return Counted.from_json(data["counted"], f"'counted' of {run.out / RUN}")


def counted_at_start(run: TrainRun, loaded: LoadedModel, ranks: Ranks) -> Counted:
    """Which tokens count, with thresholds for sinks from the first rows of the run, on every rank the same."""
    corpus = corpus_of(run, repeat=True, quiet=True)
    rows = iter(rows_of(run, loaded, corpus))
    if (first := next(rows, None)) is None:
        return Counted.of(loaded.tokenizer)  # nothing to train on, which is said where batches are asked for
    found = measure_counted(loaded.model, loaded.tokenizer, chain([first], rows), sample=corpus.name)
    return counted_of_first(found, ranks, loaded.model.device)


def carried(run: TrainRun, loaded: LoadedModel) -> dict[str, Any]:
    """What the SAEs' files say besides: which documents training did not see, and which weights it saw."""
    found = {KEY: held_out_by(run).to_json()} if run.hold_out else {}
    weights = weights_fingerprint(loaded.model)
    return found if weights is None else {**found, "base": {"weights": weights}}


def held_out_by(run: TrainRun) -> HeldOut:
    """The documents that a run keeps out of training, and how it measures on them."""
    corpus = corpus_of(run, held_out=True)
    return HeldOut(
        text=digest(corpus),
        every=run.hold_out,
        context_length=run.context_length,
        batch_size=run.batch_size,
        tokens=run.measured_on,
        chat=run.corpus.chat,
        shuffle=corpus.shuffle,
        longest=corpus.longest,
    )


def compared(
    run: TrainRun, loaded: LoadedModel, saes: Mapping[str, SAE], init: Mapping[str, SAE],
    scratch: Mapping[str, SAE], history: Mapping[str, list[dict[str, Any]]], counted: Counted,
    progress: Progress | None, ranks: Ranks,
) -> dict[str, Began]:  # fmt: skip
    """What the SAEs of this rank began as, measured on the same tokens as they are, and beside those from scratch."""
    before = measured(run, loaded, {name: init[name] for name in saes}, counted, progress, ranks)
    beside = measured(run, loaded, scratch, counted, progress, ranks) if scratch else {}
    found = {}
    for name, sae in saes.items():
        cosines = cosines_of(sae, init[name])
        if ranks.first:
            write_cosines(run.out / run.name, name, cosines)
        own = tuple(history[name])
        found[name] = Began(own, init[name].k, Moved.of(cosines), before.get(name), beside.get(name))
    return found


def finish_folder(run: TrainRun, folder: Path, facts: Mapping[str, Any]) -> None:
    """Join what the ranks measured, and write the card."""
    quality: dict[str, Any] = {}
    for path in run.out.glob("quality.rank*.json"):
        quality |= read_object(path)
        path.unlink()
    quality = dict(sorted(quality.items(), key=lambda item: HookPoint.parse(item[0])))
    write_json(run.out / "quality.json", quality)
    dropped = {name: figures["dropped"] for name, figures in quality.items()}
    measured_layers = {name: figures for name, figures in quality.items() if "fvu" in figures}
    write_card(folder, {**facts, "dropped": dropped}, measured_layers, sorted(run.out.glob("metrics*.jsonl")))


def hook_points(run: TrainRun, loaded: LoadedModel) -> list[HookPoint]:
    """The layers of the run, or NotFoundError for one that the model does not have."""
    count = n_layers(loaded.model)
    layers = run.layers or (run.start_from and layers_of(run.start_from)) or range(count)
    if bad := [layer for layer in layers if not 0 <= layer < count]:
        raise NotFoundError(f"layer {bad[0]} does not exist: {run.model} has layers 0 to {count - 1}")
    longest = context_length(loaded.model)
    if longest is not None and run.context_length > longest:
        raise InputError(f"rows of {run.context_length} tokens do not fit the model's context of {longest}")
    return [HookPoint(layer) for layer in sorted(layers)]


def source_of(run: TrainRun, loaded: LoadedModel, names: list[str], ranks: Ranks, counted: Counted) -> ResidualBuffer:
    """The residuals that this rank trains on: all of them, its documents' share, or its layers."""
    rank, world = (ranks.rank, ranks.world) if ranks.mode == "data" else (0, 1)
    corpus = corpus_of(run, rank=rank, world=world, repeat=True)
    return ResidualBuffer(
        loaded.model, rows_of(run, loaded, corpus), [HookPoint.parse(name) for name in names],
        batch=ranks.share_of(run.train.batch),
        budget=run.budget, most=ranks.share_of(run.train.batch) * run.train.steps, seed=run.train.seed,
        counted=counted, dtype=getattr(torch, run.store),
    )  # fmt: skip


def corpus_of(run: TrainRun, **share: Any) -> Corpus:
    """The documents of a run: a process' share of them, or those held out."""
    # Held-out documents are the same ones in every order of the others.
    order = None if not run.shuffle else 0 if share.get("held_out") else run.train.seed
    longest = longest_text(run.context_length)
    return Corpus.of(text_source(run.data), run.corpus, hold_out=run.hold_out, shuffle=order, longest=longest, **share)


def rows_of(run: TrainRun, loaded: LoadedModel, corpus: Corpus) -> TokenRows:
    """Documents packed into rows as the run says."""
    return TokenRows(
        corpus,
        loaded.tokenizer,
        context_length=run.context_length,
        batch_size=run.batch_size,
        chat=run.corpus.chat,
    )


def journals_of(run: TrainRun, ranks: Ranks) -> list[Callable[[StepReport], None]]:
    """Where the figures go; with layers divided among ranks, each rank keeps its own lines."""
    path = run.out / ("metrics.jsonl" if ranks.first else f"metrics.rank{ranks.rank}.jsonl")
    if not run.resume:
        path.unlink(missing_ok=True)
    found: list[Callable[[StepReport], None]] = []
    if ranks.first or ranks.mode == "layers":
        found.append(JsonlMetrics(path, run.log_every))
    if ranks.first and run.tensorboard:
        found.append(TensorBoardMetrics(run.out / "tensorboard", run.log_every))
    if ranks.first and run.wandb:
        found.append(
            WandbMetrics({"project": run.wandb, "name": run.name, "config": run.config.to_json()}, run.log_every)
        )
    return found


def save(run: TrainRun, saes: Mapping[str, SAE], folder: Path, ranks: Ranks) -> None:
    """Write the group in the official layout and the exports, one rank after the other where each has layers."""
    for rank in range(ranks.world if ranks.mode == "layers" else 1):
        if rank == ranks.rank:
            save_sae(list(saes.values()), folder, layout="official")
            for layout in run.exports:
                save_sae(list(saes.values()), run.out / layout, layout=layout)
        if ranks.mode == "layers":
            ranks.barrier()


def held_out_rows(run: TrainRun, loaded: LoadedModel) -> list[torch.Tensor]:
    """Rows of documents that training never sees, of about `measured_on` tokens."""
    rows = rows_of(run, loaded, corpus_of(run, held_out=True))
    return rows.take(run.measured_on)


def measured(
    run: TrainRun,
    loaded: LoadedModel,
    saes: Mapping[str, SAE],
    counted: Counted,
    progress: Progress | None,
    ranks: Ranks,
) -> dict[str, Quality]:
    """The quality of this rank's SAEs on held-out documents, which ranks that have the same SAEs share."""
    if not run.measured_on:
        return {}
    rows = held_out_rows(run, loaded)
    if not rows:
        raise InputError(
            f"the SAEs are saved, but the held-out documents of {named(run.data)} fill no row to measure on"
        )
    here = {HookPoint.parse(name): sae.to(loaded.model.device) for name, sae in saes.items()}
    found = evaluate_saes(loaded.model, here, rows, counted=counted, progress=progress, ranks=ranks)
    return {str(point): figures for point, figures in found.items()}


def facts_of(run: TrainRun, loaded: LoadedModel, counted: Counted) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    facts = json.loads(
        json.dumps(asdict(replace(run, group=run.name, counted=None, eval_tokens=run.measured_on)), default=str)
    )
    facts["counted"] = counted.to_json()
    facts["train"] = run.config.resolved()
    if run.against_scratch:
        facts["scratch"] = run.train.anew().resolved()
    versions = {"python": platform.python_version()}
    for package in ("qwen-scope", "torch", "transformers", "numpy"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    held = f"held-out documents of {named(run.data)} (one in {run.hold_out})"
    return {**facts, "device": str(loaded.model.device), "eval_data": held, "versions": versions}


def callbacks_of(
    on_step: Callable[[StepReport], None] | None, progress: Progress | None
) -> list[Callable[[StepReport], None]]:
    """What is called after a step that is saved."""
    found = [on_step] if on_step else []
    if progress is not None:
        found.append(lambda step: progress("training", step.step / step.steps, step.line()))
    return found


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
