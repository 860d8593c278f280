"""The monitor on the lab: what it costs, whether it sees bad data before the held-out loss does, and its false alarms.

    .venv/bin/python bench/monitor_lab.py [--write] [--clean 10] [--planted 3]

The bundled model is fine-tuned on clean chats (no rude ones). In planted runs, from one step on, half of the chats are
others: their answers drift into Chinese or Russian, or they are rude. Every run is measured every few steps, by the
monitor on held-out chats and by the loss on the same chats. The cost is measured in one longer run at the monitor's
own cadence, in CPU time, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from sections import paragraph, table, write_section
from transformers import PrinterCallback
from transformers.utils import logging
from trl.trainer.sft_config import SFTConfig

from qwen_scope import Scope, load_scope
from qwen_scope.lab import LANGUAGES, Document, default_mixture, documents
from qwen_scope.model import load_model
from qwen_scope.posttrain import (
    FeatureSFTTrainer,
    Monitor,
    Sample,
    chats_only,
    dataset_of,
    lab_samples,
    prepare,
    read_monitor,
)
from qwen_scope.scope import model_source

TITLE = "The monitor on the lab"
PLANTED = ("zh", "ru", "rude")
LAYERS, FEATURES, EVERY, STEPS, FROM, BATCH, SHARE = (4, 5), 1, 4, 32, 8, 8, 0.5
LR, HELD_OUT, ALARM, COST_STEPS, COST_PROBES = 3e-4, 24, 1.0, 60, 6
Watch = dict[str, dict[int, list[int]]]


@dataclass(frozen=True)
class Run:
    """Measurements of one run.

    Attributes:
        planted: what was planted, or None.
        steps: when it was measured.
        loss: on the held-out chats.
        effect: per concept the mean effect on its features, up or down: what the alarm looks at.
        alarms: per concept the step of the monitor's alarm.
        rise: per concept the mean effect on its features, with its sign.
    """

    planted: str | None
    seed: int
    steps: list[int]
    loss: list[float]
    effect: dict[str, list[float]]
    rise: dict[str, list[float]]
    alarms: dict[str, int]


def chats(seed: int, keep: Callable[[Document], bool], drift: str | None = None, split: str = "train") -> Iterator[Any]:
    """Chats of the lab without end, as documents; all of them drift where that is told."""
    mixture = replace(default_mixture(), chat={"topic": 1.0})
    if drift is not None:
        others = [code for code in LANGUAGES if code not in {drift, "zh", "ja"}]
        mixture = replace(mixture, drift={code: {drift: 1.0} for code in others})
    kinds = ["drift"] if drift else ["chat"]
    return (d for d in documents(split=split, seed=seed, n=None, kinds=kinds, mixture=mixture) if keep(d))


def polite(document: Document) -> bool:
    return document.register != "rude"


def training_data(planted: str | None, seed: int) -> list[Sample]:
    """Batch by batch in the order of training; from step `FROM` on, a share is planted."""
    clean = chats(3000 + seed, polite)
    if planted == "rude":
        bad = chats(5000 + seed, lambda d: d.register == "rude")
    else:
        bad = chats(5000 + seed, polite, planted) if planted else clean
    rows: list[Sample] = []
    for step in range(STEPS):
        n_bad = int(SHARE * BATCH) if step >= FROM else 0
        for source, n in ((bad, n_bad), (clean, BATCH - n_bad)):
            rows += islice((s for d in source for s in chats_only(lab_samples([d]))), n)
    return rows


def held_out() -> list[Document]:
    """Clean chats in the languages that nothing is planted in."""
    found = chats(7, lambda d: polite(d) and d.language not in {"zh", "ja", "ru"}, split="heldout_sentences")
    return list(islice(found, HELD_OUT))


def watched(scope: Scope) -> Watch:
    """Per concept the features of its alpha table."""
    talks = list(documents(seed=500, n=270, kinds=["talk"]))
    by_language = [(str(d.language), d.text) for d in talks]
    by_register = [(str(d.register), d.text) for d in talks]
    out: Watch = {}
    for concept in PLANTED:
        labelled = by_register if concept == "rude" else by_language
        found = prepare(scope, labelled, concept, layers=LAYERS, features=FEATURES)
        out[concept] = {one.layer: list(one.features) for one in found.layers}
    return out


def trainer_of(
    folder: str, rows: list[Sample], evaluated: list[Sample], monitor: Monitor, **more: Any
) -> FeatureSFTTrainer:
    """Plain fine-tuning of the bundled model under a monitor, in the order of the rows."""
    loaded = load_model(model_source("lab"))
    settings: dict[str, Any] = {
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": HELD_OUT,
        "max_length": 256,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    loaded.model.requires_grad_(True)
    trainer = FeatureSFTTrainer(
        loaded.model,
        SFTConfig(folder, **settings | more),
        train_dataset=dataset_of(rows),
        eval_dataset=dataset_of(evaluated),
        processing_class=loaded.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    monitor.attach(trainer)
    return trainer


def one_run(scope: Scope, watch: Watch, planted: str | None, seed: int) -> Run:
    """Fine-tune, and read what was measured on the way."""
    kept = held_out()
    together = {layer: sorted({f for one in watch.values() for f in one[layer]}) for layer in LAYERS}
    labels = {(layer, f): name for name, one in watch.items() for layer, some in one.items() for f in some}
    saes = {layer: scope.saes[layer] for layer in LAYERS}
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(
            saes,
            scope.tokenizer,
            [d.text for d in kept],
            folder,
            watch=together,
            every=EVERY,
            alarm=ALARM,
            labels=labels,
        )
        rows = training_data(planted, seed)
        more = {"eval_strategy": "steps", "eval_steps": EVERY, "max_steps": STEPS, "seed": seed}
        trainer = trainer_of(folder, rows, lab_samples(kept), monitor, **more)
        trainer.train()
        lines = read_monitor(monitor.path)[1:]
        losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    effect: dict[str, list[float]] = {concept: [] for concept in watch}
    rise: dict[str, list[float]] = {concept: [] for concept in watch}
    for line in lines:
        by = {(entry["layer"], one["feature"]): one["effect"] for entry in line["layers"] for one in entry["watched"]}
        for concept, features in watch.items():
            values = [by[layer, f] for layer, some in features.items() for f in some]
            effect[concept].append(abs(float(np.mean(values))))
            rise[concept].append(float(np.mean(values)))
    steps = [line["step"] for line in lines]
    alarms = {str(one["concept"]): int(one["step"]) for line in lines for one in line["alarms"]}
    return Run(planted, seed, steps, [losses[step] for step in steps], effect, rise, alarms)


def cost(scope: Scope, watch: Watch) -> dict[str, float]:
    """The share of CPU time that goes into the monitor's callbacks at its own cadence; step 0 and the end apart."""
    saes = {layer: scope.saes[layer] for layer in LAYERS}
    kept = held_out()[:COST_PROBES]
    spent = {"on_train_begin": 0.0, "on_step_end": 0.0, "on_log": 0.0, "on_train_end": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(
            saes, scope.tokenizer, [d.text for d in kept], folder, watch=watch["zh"], clock=time.process_time
        )

        def timed(name: str) -> Callable[..., None]:
            inner = getattr(monitor, name)

            def call(*args: Any, **kwargs: Any) -> None:
                begun = time.process_time()
                inner(*args, **kwargs)
                spent[name] += time.process_time() - begun

            return call

        for name in spent:
            setattr(monitor, name, timed(name))
        rows = list(islice((s for d in chats(9000, polite) for s in lab_samples([d])), 64 * BATCH))
        trainer = trainer_of(folder, rows, lab_samples(kept), monitor, max_steps=COST_STEPS)
        begun = time.process_time()
        trainer.train()
        whole = time.process_time() - begun
        lines = read_monitor(monitor.path)
    during = spent["on_step_end"] + spent["on_log"]
    return {
        "steps": COST_STEPS,
        "measurements": len(lines),
        "seconds": whole,
        "during": during / whole,
        "all": sum(spent.values()) / whole,
    }


def first(steps: list[int], values: np.ndarray, bound: np.ndarray | float) -> int | None:
    """The first step at which a value passes its bound, or None."""
    over = np.flatnonzero(values > bound)
    return steps[over[0]] if len(over) else None


def band(clean: list[Run], of: Callable[[Run], list[float]]) -> np.ndarray:
    """Per measurement, what lies three standard deviations above the clean runs."""
    values = np.array([of(run) for run in clean])
    return values.mean(0) + 3 * values.std(0, ddof=1)


def false_alarms(clean: list[Run], of: Callable[[Run], list[float]]) -> int:
    """How many clean runs leave the band of the other clean runs."""
    rest = [[other for other in clean if other is not run] for run in clean]
    return sum(
        first(run.steps, np.array(of(run)), band(others, of)) is not None
        for run, others in zip(clean, rest, strict=True)
    )


def written(runs: list[Run], price: dict[str, float]) -> str:
    """The section of docs/results.md."""
    clean = [run for run in runs if run.planted is None]
    rows: list[tuple[object, ...]] = []
    early = {"default": 0, "band": 0}
    for run in runs:
        if (concept := run.planted) is None:
            continue
        moved = first(run.steps, np.array(run.loss), band(clean, lambda r: r.loss))
        rose = first(run.steps, np.array(run.rise[concept]), band(clean, lambda r, c=concept: r.rise[c]))
        alarm = run.alarms.get(concept)
        for name, step in (("default", alarm), ("band", rose)):
            early[name] += step is not None and step > FROM and (moved is None or step < moved)
        final = run.loss[-1] - float(np.mean([c.loss[-1] for c in clean]))
        largest = max(run.effect[concept])
        rows.append((concept, run.seed, alarm or "none", rose or "none", moved or "none", largest, f"{final:+.3f}"))
    raised = sum(bool(run.alarms) for run in clean)
    by = ", ".join(f"{c} {sum(c in run.alarms for run in clean)}" for c in PLANTED)
    left = ", ".join(f"{c} {false_alarms(clean, lambda r, c=c: r.rise[c])}" for c in PLANTED)
    head = f"""`bench/monitor_lab.py`: the bundled model on clean chats, {STEPS} steps of {BATCH}, lr {LR:g}; after step
        {FROM}, {SHARE:.0%} of the chats of a planted run drift into Chinese or Russian, or are rude. The monitor
        watches the top {FEATURES} features of every concept at layers {", ".join(map(str, LAYERS))} on {HELD_OUT}
        held-out chats in other languages, every {EVERY} steps. Its alarm is at the default, a mean effect of
        {ALARM:g} on a concept's features, twice in a row. Beside it, on an equal footing: the first step at which the
        mean effect on the concept's features, and the loss on the same chats, lies three standard deviations above the
        {len(clean)} clean runs."""
    middle = f"""In {early["default"]} of {len(rows)} planted runs the default alarm came after the planting and before
        the loss moved; against the band of clean runs in {early["band"]}. False alarms: {raised} of {len(clean)} clean
        runs raised one at the default (by concept: {by}). Left out of the band in turn, clean runs left it this often:
        {left}; by their loss {false_alarms(clean, lambda r: r.loss)}."""
    tail = f"""Cost at the default cadence, {COST_PROBES} probe texts, {price["steps"]} steps in
        {price["seconds"]:.0f} s of CPU time: {price["during"]:.2%} of it in the monitor while training,
        {price["all"]:.2%} with those at step 0 and at the end; {price["measurements"]} measurements in all."""
    columns = ("planted", "seed", "default alarm at step", "mean effect leaves the band", "loss leaves the band")
    columns += ("largest effect", "loss at the end less clean")
    return "\n\n".join((paragraph(head), table(columns, rows), paragraph(middle), paragraph(tail)))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--clean", type=int, default=10)
    ask.add_argument("--planted", type=int, default=3)
    ask.add_argument("--keep", type=Path, help="a .jsonl that finished runs are added to and taken from")
    ask.add_argument("--write", action="store_true", help="write the section of docs/results.md")
    given = ask.parse_args()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    scope = load_scope("lab")
    watch = watched(scope)
    price = cost(scope, watch)
    print(json.dumps(price), flush=True)
    kept = given.keep.read_text().splitlines() if given.keep and given.keep.is_file() else []
    runs = [Run(**json.loads(line)) for line in kept]
    wanted = [(None, seed) for seed in range(given.clean)]
    wanted += [(planted, 100 + seed) for seed in range(given.planted) for planted in PLANTED]
    for planted, seed in wanted:
        if (planted, seed) in {(run.planted, run.seed) for run in runs}:
            continue
        runs.append(one_run(scope, watch, planted, seed))
        print(json.dumps(asdict(runs[-1])), flush=True)
        if given.keep:
            with given.keep.open("a") as file:
                file.write(json.dumps(asdict(runs[-1])) + "\n")
    body = written(runs, price)
    print(body)
    if given.write:
        write_section(TITLE, body)


if __name__ == "__main__":
    main()
