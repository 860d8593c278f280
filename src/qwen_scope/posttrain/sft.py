"""A whole fine-tuning run: plain, with the auxiliary loss, or with the penalty on tokens; TRL trains.

```
out/
  run.json       the resolved settings, versions and seed
  log.jsonl      what the trainer logged, one line each
  metrics.json   losses at the end, and the monitor's alarms
  monitor.jsonl  what the features did on the probe texts, with --monitor
  checkpoints/   TRL's own, for --resume
  model/         the result, loadable like any model (a LoRA adapter is merged; it lies beside, in adapter/)
```
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig

from qwen_scope.errors import InputError
from qwen_scope.model import LoadedModel, load_model
from qwen_scope.report import Progress
from qwen_scope.scope import model_source, resolve, saes_on

from .answers import ProbePrompts
from .checkpoints import last_checkpoint, run_id
from .data import SFTData
from .loss import ExtraLoss, FeatureLoss, TokenPenalty
from .monitor import Monitor, read_monitor
from .options import SFTRun
from .prepare import versions
from .runs import JsonlLog, adapters, save_model, trained_model, trl_settings, write_json, writing_to
from .samples import Sample, dataset_of
from .sources import PROBES, check_run, probe_texts, read_rows, training_samples
from .table import AlphaTable, read_table
from .trainer import TOO_LONG, FeatureSFTTrainer


def sft(run: SFTRun, data: SFTData, *, progress: Progress | None = None) -> dict[str, Any]:
    """Read the rows and train on them; returns what `metrics.json` holds.

    Args:
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        QwenScopeError: with one sentence, before training where the cause can be known before.
    """
    check_run(run.out, run.model, run.sae, data.source, data.held_out, data.monitor, data.monitor_prompts, data.table)
    table, unused = None if data.table is None else read_table(data.table), Counter[str]()
    columns, seed = (data.prompt_column, data.group_column), data.reading.seed
    learnt = training_samples(data.source, data.reading, *columns, run.model, unused)
    later = replace(data.reading, sample=None, seed=seed + 1)
    kept = training_samples(data.held_out, later, *columns, run.model) if data.held_out else []
    probe = probe_texts(data.monitor) if data.monitor else []
    if data.monitor_prompts and not (probe and table):
        raise InputError("monitor_prompts= goes with monitor= and table=: the table's features are read on answers")
    how = replace(later, column=data.prompt_column, unit="line", seed=seed + 3)
    asked = read_rows(data.monitor_prompts, how, None, PROBES, run.model, held_out=True) if data.monitor_prompts else []
    prompts = [row["prompt"] for row in asked]
    return run_sft(run, learnt, kept, table, probe=probe, probe_prompts=prompts, unused=unused, progress=progress)


def run_sft(
    run: SFTRun,
    samples: Sequence[Sample],
    held_out: Sequence[Sample] = (),
    table: AlphaTable | None = None,
    *,
    probe: Sequence[str] = (),
    probe_prompts: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
    unused: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Train and save; returns what `metrics.json` holds.

    Args:
        samples: to learn from.   held_out: to report the cross-entropy on.
        table: features, groups and tokens; the method `plain` needs none.
        probe: texts for a `Monitor`, which watches the features of the table, or else ranks those of the last two
            layers that have an SAE.
        probe_prompts: prompts for it, whose answers it reads as well; they take a table.
        callbacks: further ones.
        progress: called with the stage, its share done (0 to 1) and a short text.
        unused: rows of the data that could not be used, by reason, for the record of the run.

    Raises:
        QwenScopeError: with one sentence, before training where the cause can be known before.
    """
    if not samples:
        raise InputError("there is no sample to learn from")
    with writing_to(run.out):
        return _run(run, samples, held_out, table, probe, probe_prompts, callbacks, progress, unused or {})


def _run(
    run: SFTRun,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    table: AlphaTable | None,
    probe: Sequence[str],
    probe_prompts: Sequence[str],
    callbacks: Sequence[TrainerCallback],
    progress: Progress | None,
    unused: Mapping[str, int],
) -> dict[str, Any]:
    """Everything that can be refused comes before the first file."""
    loaded = load_model(model_source(run.model), device=run.device, dtype=run.dtype)
    loaded.model.requires_grad_(run.lora is None)
    extra = extra_of(run, loaded, table)
    resume = last_checkpoint(run.out) if run.resume else None
    trainer = FeatureSFTTrainer(
        loaded.model,
        sft_config(run, loaded),
        train_dataset=dataset_of(list(samples)),
        eval_dataset=dataset_of(list(held_out)) if held_out else None,
        processing_class=loaded.tokenizer,
        callbacks=[JsonlLog(run.out / "log.jsonl", progress, losses), *callbacks],
        peft_config=adapters(run.lora),
        extra=extra,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.run_id = run_id(run.out) if resume else uuid4().hex
    monitor = monitor_of(run, loaded, table, probe, probe_prompts).attach(trainer) if probe else None
    facts = {**asdict(run), "samples": len(samples), "held_out": len(held_out), "versions": versions()}
    facts["unused"] = dict(unused) | ({TOO_LONG: trainer.dropped["train"]} if trainer.dropped.get("train") else {})
    facts |= {"target": table.target if table else None, "id": trainer.run_id}
    if trainer.is_world_process_zero():
        write_json(run.out / "run.json", facts)
    done = trainer.train(resume_from_checkpoint=resume)
    metrics: dict[str, Any] = {"steps": done.global_step, "train_loss": done.training_loss}
    if held_out:
        metrics["held_out_loss"] = trainer.evaluate()["eval_loss"]
    if monitor is not None and trainer.is_world_process_zero():
        metrics["alarms"] = [alarm for line in read_monitor(monitor.path) for alarm in line["alarms"]]
    if trainer.is_world_process_zero():
        save_model(trained_model(trainer, run.out), loaded, run.out)
        write_json(run.out / "metrics.json", metrics)
    return metrics


def extra_of(run: SFTRun, loaded: LoadedModel, table: AlphaTable | None) -> ExtraLoss | None:
    """The extra term of a run."""
    if run.method == "plain":
        return None
    if table is None:
        raise InputError(f"the method {run.method!r} needs an alpha table; make one with qwen-scope posttrain prepare")
    if run.method == "penalty":
        return TokenPenalty(table, loaded.model, weight=run.weight, scale=run.lambda_scale)
    saes = saes_on(loaded, resolve(run.model, run.sae)[1])
    return FeatureLoss(
        table, saes, weight=run.weight, scale=run.lambda_scale, layers=run.layers, zero=run.zero, enhance=run.enhance
    )


def monitor_of(
    run: SFTRun, loaded: LoadedModel, table: AlphaTable | None, probe: Sequence[str], probe_prompts: Sequence[str]
) -> Monitor:
    """The watch of a run: on the features of its table, where it has one."""
    saes = saes_on(loaded, resolve(run.model, run.sae)[1], device=loaded.model.device)
    watch = None if table is None else {one.layer: one.features for one in table.layers}
    labels = {}
    for one in table.layers if table else ():
        assert table is not None
        table.check_sae(one.layer, saes[one.layer])
        labels |= {(one.layer, feature): table.target for feature in one.features}
    layers = saes.layers[-2:] if watch is None else list(watch)
    chosen = {layer: saes[layer] for layer in layers}
    return Monitor(
        chosen,
        loaded.tokenizer,
        probe,
        run.out,
        watch=watch,
        labels=labels,
        probe_prompts=ProbePrompts(probe_prompts) if probe_prompts else None,
        every=run.watch_every,
        held=True,
    )


def sft_config(run: SFTRun, loaded: LoadedModel) -> SFTConfig:
    """The run in TRL's words."""
    return SFTConfig(
        **trl_settings(run, loaded),
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=max(8, run.batch),
        gradient_accumulation_steps=run.accumulate,
        num_train_epochs=run.epochs,
        max_steps=run.max_steps,
        weight_decay=run.weight_decay,
        lr_scheduler_type="cosine",
        max_length=run.max_length,
        packing=run.packing,
        logging_steps=run.log_every,
    )


def losses(log: Mapping[str, float]) -> str:
    """The losses of a line of the log."""
    return "  ".join(f"{name} {log[name]:.3g}" for name in ("loss", "feature_loss", "token_penalty") if name in log)


def held_out_loss(loaded: LoadedModel, samples: Sequence[Sample], *, batch: int = 8, max_length: int = 2048) -> float:
    """The cross-entropy on the responses of samples, in nats per token, as the trainer reports it while it trains."""
    with TemporaryDirectory() as folder:
        data = dataset_of(list(samples))
        run = SFTRun(loaded.name, Path(folder), batch=batch, max_length=max_length)
        trainer = FeatureSFTTrainer(
            loaded.model,
            sft_config(run, loaded),
            # TRL asks for one, and by its columns decides whether prompts count; nothing is trained.
            train_dataset=dataset_of([dict.fromkeys(data.column_names, ".")]),
            eval_dataset=data,
            processing_class=loaded.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        return float(trainer.evaluate()["eval_loss"])
