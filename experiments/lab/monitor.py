"""The monitor on the lab: what it costs, whether it sees bad data before held-out metrics do, and its false alarms.

    python -m experiments.lab.monitor [--conditions clean,zh,ru,rude] [--seeds 0-9] [--write]

The bundled model is fine-tuned into an assistant that is never rude and stays in its language, and is trained further
on more of the same chats. In planted runs, from one step on, a share of the chats drift into Chinese or Russian, or are
rude. Every few steps it is measured by the monitor, by the loss on held-out chats, and by its behaviour: the share of
sampled answers with the wrong script or a rude word. The cost is measured separately, at the monitor's default cadence,
in CPU time.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl.trainer.sft_config import SFTConfig

from experiments.fine_tuning import QUIET
from experiments.harness import At, Experiment, Row, main
from experiments.lab.planted_chats import chats, held_out, questions, shows, texts_of, training_data
from experiments.sections import paragraph, table
from qwen_scope import Scope, load_scope
from qwen_scope.lab import documents
from qwen_scope.model import load_model
from qwen_scope.posttrain import (
    FeatureSFTTrainer,
    Monitor,
    ProbePrompts,
    Sample,
    dataset_of,
    prepare,
    read_monitor,
)
from qwen_scope.posttrain.activity import evaluating
from qwen_scope.scope import model_source
from qwen_scope.steer import generate

TITLE = "The monitor on the lab"
PLANTED = ("zh", "ru", "rude")
LAYERS, FEATURES, EVERY, FROM, BATCH, SHARE, LR = (4, 5), 1, 4, 8, 8, 0.25, 1e-4
START_BATCH, START_LR, TEXTS, TOKENS, AT_START = 16, 5e-4, 24, 40, 4
ALARM, MORE, COST_PROBES, COST_PROMPTS = 1.0, 3.0, 6, 16
PLANTED_SEEDS = 4  # runs of every planted concept; the clean ones are more, since they make the band
COSTS = ("cost of texts", "cost of answers")
Watch = dict[str, dict[int, list[int]]]


@dataclass(frozen=True)
class Sizes:
    """Questions that are answered; steps of the start model, of a run and of the two measurements of cost."""

    prompts: int = 64
    start: int = 150
    steps: int = 56
    cost: int = 60
    long_cost: int = 1500


@dataclass(frozen=True)
class Run:
    """Measurements of one run.

    Attributes:
        planted: what was planted, or None.
        steps: when it was measured.
        loss: on the held-out chats; of step 0 there is none.
        effect, rise_in_generation: per concept the two readings that the monitor's alarm looks at.
        alarms: per concept the step of the monitor's alarm.
        hits: per concept how many of `answers` show it.
        answers: how many were sampled to count hits in.
    """

    planted: str | None
    seed: int
    steps: list[int]
    loss: list[float]
    effect: dict[str, list[float]]
    rise_in_generation: dict[str, list[float]]
    alarms: dict[str, int]
    hits: dict[str, list[int]]
    answers: list[int]


class Behaviour(TrainerCallback):
    """Counts answers that show a concept, to questions that the monitor does not ask, when the monitor measures."""

    def __init__(self, tokenizer: Any, n: int) -> None:
        self.tokenizer, self.asked = tokenizer, ProbePrompts(questions(8, n), TOKENS, seed=1000)
        self.hits: dict[str, list[int]] = {concept: [] for concept in PLANTED}
        self.answers: list[int] = []

    def measure(self, model: Any, times: int) -> None:
        turn, found = sum(self.answers) // len(self.asked.prompts), []
        with evaluating(model):
            for at in range(turn, turn + times):
                found += generate(model, self.tokenizer, self.asked.prompts, decoding=self.asked.decoding(at))
        self.answers.append(len(found))
        for concept, counts in self.hits.items():
            counts.append(sum(shows(concept, one.text) for one in found))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.measure(model, AT_START)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            self.measure(model, 1)


@cache
def lab() -> Scope:
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    return load_scope("lab")


@cache
def watched() -> Watch:
    """Per concept the features of its alpha table."""
    talks = list(documents(seed=500, n=270, kinds=["talk"]))
    by_language = [(str(d.language), d.text) for d in talks]
    by_register = [(str(d.register), d.text) for d in talks]
    out: Watch = {}
    for concept in PLANTED:
        labelled = by_register if concept == "rude" else by_language
        found = prepare(lab(), labelled, concept, layers=LAYERS, features=FEATURES)
        out[concept] = {one.layer: list(one.features) for one in found.layers}
    return out


def trainer_of(
    start: str, folder: str, rows: list[Sample], evaluated: list[Sample], callbacks: Sequence[Any] = (), **more: Any
) -> FeatureSFTTrainer:
    """Plain fine-tuning of a model, in the order of the rows."""
    loaded = load_model(start)
    settings: dict[str, Any] = {
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": TEXTS,
        "train_sampling_strategy": "sequential",
    }
    loaded.model.requires_grad_(True)
    trainer = FeatureSFTTrainer(
        loaded.model,
        SFTConfig(folder, **QUIET | settings | more),
        train_dataset=dataset_of(rows),
        eval_dataset=dataset_of(evaluated),
        processing_class=loaded.tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_start(folder: Path, steps: int) -> None:
    """The assistant that every run starts from."""
    settings = {"learning_rate": START_LR, "lr_scheduler_type": "cosine", "warmup_steps": 5, "max_steps": steps}
    rows = list(islice(chats(2900), steps * START_BATCH))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(
            model_source("lab"), scratch, rows, held_out(TEXTS), per_device_train_batch_size=START_BATCH, **settings
        )
        trainer.train()
    for made in (trainer.model, trainer.processing_class):
        cast(Any, made).save_pretrained(folder)


def one_run(start: str, watch: Watch, planted: str | None, seed: int, sizes: Sizes) -> Run:
    """Fine-tune, and read what was measured on the way."""
    scope = lab()
    kept, behaviour = held_out(TEXTS), Behaviour(scope.tokenizer, sizes.prompts)
    together = {layer: sorted({f for one in watch.values() for f in one[layer]}) for layer in LAYERS}
    labels = {(layer, f): name for name, one in watch.items() for layer, some in one.items() for f in some}
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(
            {layer: scope.saes[layer] for layer in LAYERS},
            scope.tokenizer,
            texts_of(kept),
            folder,
            watch=together,
            labels=labels,
            probe_prompts=ProbePrompts(questions(9, sizes.prompts), TOKENS, at_start=AT_START),
            every=EVERY,
            alarm=ALARM,
            rise_in_generation=MORE,
        )
        more = {"eval_strategy": "steps", "eval_steps": EVERY, "max_steps": sizes.steps, "seed": seed}
        rows = training_data(planted, seed, steps=sizes.steps, batch=BATCH, begin=FROM, share=SHARE)
        trainer = trainer_of(start, folder, rows, kept, [behaviour], **more)
        monitor.attach(trainer)
        trainer.train()
        lines = read_monitor(monitor.path)
        losses = [float(entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    readings: dict[str, dict[str, list[float]]] = {
        reading: {
            concept: [one[reading] for line in lines for one in line["concepts"] if one["concept"] == concept]
            for concept in watch
        }
        for reading in ("effect", "rise_in_generation")
    }
    alarms = {str(one["concept"]): int(one["step"]) for line in lines for one in line["alarms"]}
    steps = [int(line["step"]) for line in lines]
    return Run(planted, seed, steps, losses, **readings, alarms=alarms, hits=behaviour.hits, answers=behaviour.answers)


def cost(start: str, watch: Watch, asked: ProbePrompts | None, steps: int) -> dict[str, float]:
    """The share of CPU time that goes into the monitor's callbacks at its own cadence; step 0 and the end apart."""
    kept, scope = held_out(TEXTS), lab()
    spent = {"on_train_begin": 0.0, "on_step_end": 0.0, "on_log": 0.0, "on_train_end": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(
            {layer: scope.saes[layer] for layer in LAYERS},
            scope.tokenizer,
            texts_of(kept)[:COST_PROBES],
            folder,
            watch=watch["zh"],
            probe_prompts=asked,
            clock=time.process_time,
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
        rows = list(islice(chats(9000), 64 * BATCH))
        trainer = trainer_of(start, folder, rows, kept, max_steps=steps)
        monitor.attach(trainer)
        begun = time.process_time()
        trainer.train()
        whole = time.process_time() - begun
        lines = read_monitor(monitor.path)
    during = spent["on_step_end"] + spent["on_log"]
    return {
        "steps": steps,
        "measurements": len(lines),
        "seconds": whole,
        "during": during / whole,
        "all": sum(spent.values()) / whole,
    }


def run(at: At[Sizes], condition: str, seed: int) -> dict[str, Any]:
    """One fine-tuning with its measurements, or what the monitor costs."""
    lab()  # which silences the bars
    sizes, start = at.sizes, str(at.folder / "start")
    if not Path(start, "config.json").is_file():
        make_start(Path(start), sizes.start)
    if condition == "cost of texts":
        return cost(start, watched(), None, sizes.cost)
    if condition == "cost of answers":
        asked = ProbePrompts(questions(9, COST_PROMPTS), TOKENS, at_start=AT_START)
        return cost(start, watched(), asked, sizes.long_cost)
    planted = None if condition == "clean" else condition
    return asdict(one_run(start, watched(), planted, (30 if planted is None else 130) + seed, sizes))


def takes(condition: str, seed: int) -> bool:
    """Every clean seed, fewer planted ones, and each cost once."""
    return seed < {"clean": seed + 1, **dict.fromkeys(COSTS, 1)}.get(condition, PLANTED_SEEDS)


def twice(steps: Sequence[int], beyond: np.ndarray) -> int | None:
    """The step of the first measurement that lies beyond like the one before it, or None; the alarm's own rule."""
    found = np.flatnonzero(beyond[1:] & beyond[:-1])
    return steps[found[0] + 1] if len(found) else None


def over(run: Run, clean: Sequence[Run], of: Callable[[Run], np.ndarray]) -> int | None:
    """When a figure lies three standard deviations above the clean runs, twice in a row."""
    values = np.array([of(other) for other in clean])
    return twice(run.steps[-values.shape[1] :], of(run) > values.mean(0) + 3 * values.std(0, ddof=1))


def share_of(run: Run, concept: str) -> np.ndarray:
    """The share of answers that show a concept."""
    return np.array(run.hits[concept]) / np.array(run.answers)


def risen(run: Run, concept: str) -> int | None:
    """When that share lies three standard errors above step 0 (two binomial proportions), twice in a row."""
    hits, n = np.array(run.hits[concept], float), np.array(run.answers, float)
    rate = (hits + hits[0]) / (n + n[0])
    error = np.sqrt(rate * (1 - rate) * (1 / n + 1 / n[0]))
    beyond = hits / n - hits[0] / n[0] > 3 * np.maximum(error, 1e-9)
    beyond[0] = False
    return twice(run.steps, beyond)


def before(alarm: int | None, metric: int | None) -> bool:
    """Whether an alarm after the planting came before a metric moved."""
    return alarm is not None and alarm > FROM and (metric is None or alarm < metric)


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    found = [Run(**{name: row[name] for name in Run.__annotations__}) for row in rows if row["condition"] not in COSTS]
    price = {row["condition"].removeprefix("cost of "): row for row in rows if row["condition"] in COSTS}
    return compared(sorted(found, key=lambda run: run.seed), price, at.sizes)


def compared(runs: list[Run], price: dict[str, Row], sizes: Sizes) -> str:
    """The planted runs beside the clean ones, and what the monitor costs."""
    clean = [run for run in runs if run.planted is None]
    rows: list[tuple[object, ...]] = []
    early: dict[str, Counter[str]] = {concept: Counter() for concept in PLANTED}
    strangers = 0
    for run in (run for run in runs if run.planted is not None):
        concept = str(run.planted)
        readings = (
            twice(run.steps, np.abs(np.array(run.effect[concept])) > ALARM),
            twice(run.steps, np.abs(np.array(run.rise_in_generation[concept])) > MORE),
        )
        metrics = {
            "loss": over(run, clean, lambda r: np.array(r.loss)),
            "share": risen(run, concept),
            "band": over(run, clean, lambda r, c=concept: share_of(r, c)),
        }
        alarm = run.alarms.get(concept)
        early[concept]["runs"] += 1
        early[concept].update(name for name, step in metrics.items() if before(alarm, step))
        early[concept]["raised"] += alarm is not None and alarm > FROM
        strangers += sum(other != concept for other in run.alarms)
        late = share_of(run, concept)[-4:].mean()
        final = run.loss[-1] - float(np.mean([other.loss[-1] for other in clean]))
        shown = [step or "none" for step in (alarm, *readings, *metrics.values())]
        rows.append((concept, run.seed, *shown, f"{late:.0%}", f"{final:+.3f}"))
    said = "; ".join(
        f"{concept}: raised in {found['raised']} of {found['runs']}, before the loss in {found['loss']}, before the"
        f" share of answers by the alarm's own test in {found['share']}, by the clean runs in {found['band']}"
        for concept, found in early.items()
    )
    raised = sum(bool(run.alarms) for run in clean)
    rest = [[other for other in clean if other is not run] for run in clean]
    moved = sum(
        over(run, others, lambda r: np.array(r.loss)) is not None for run, others in zip(clean, rest, strict=True)
    )
    head = f"""`python -m experiments.lab.monitor --write`: every run starts from the bundled model fine-tuned on
        clean chats ({sizes.start} steps of {START_BATCH}) and continues with more of them, {sizes.steps} steps of
        {BATCH}, lr {LR:g}. After step {FROM}, {SHARE:.0%} of the chats of a planted run drift into Chinese or
        Russian, or are answered rudely. Every {EVERY} steps the monitor reads the top {FEATURES} feature of every
        concept at layers {" and ".join(map(str, LAYERS))} on {TEXTS} held-out chats in other languages, and on its
        answers to {sizes.prompts} questions ({AT_START} each at step 0). Its alarms are at the defaults: a mean
        effect of {ALARM:g} on the texts, or {MORE:g} standard errors more answers, twice in a row. Features,
        thresholds and lengths were chosen on other seeds."""
    metrics = f"""The held-out metrics, chosen before these runs: the loss on the same chats, and the share of answers
        to {sizes.prompts} other questions that contain a letter of the wrong script or a rude word. A metric has
        moved when it is, twice in a row, three standard deviations above the {len(clean)} clean runs; the share also
        when it is three standard errors above step 0, twice in a row, which like the alarm needs no clean runs."""
    middle = f"""{said[0].upper() + said[1:]}. False alarms: {raised} of {len(clean)} clean runs raised one, and
        planted runs raised {strangers} for another concept. With each clean run left out of the band in turn, {moved}
        of them left it by their loss."""
    columns = ("planted", "seed", "alarm at step", "by texts", "by answers", "loss moves", "share rises")
    columns += ("share leaves clean runs", "share at the end", "loss at the end less clean")
    parts = [paragraph(head), paragraph(metrics), table(columns, rows), paragraph(middle)]
    return "\n\n".join([*parts, *([paragraph(costs(price))] if len(price) == len(COSTS) else [])])


def costs(price: dict[str, Row]) -> str:
    """What the monitor takes of the CPU time."""
    texts, answers = price["texts"], price["answers"]
    return f"""Cost at the default cadence: on {COST_PROBES} probe texts, {texts["steps"]} steps in
        {texts["seconds"]:.0f} s of CPU time, {texts["during"]:.2%} of it in the monitor while training and
        {texts["all"]:.2%} with step 0 and the end ({texts["measurements"]} measurements in all); with {COST_PROMPTS}
        questions answered as well, {answers["steps"]} steps in {answers["seconds"]:.0f} s, {answers["during"]:.2%} and
        {answers["all"]:.2%} ({answers["measurements"]} measurements)."""


experiment = Experiment(
    title=TITLE,
    varies={"condition": ("clean", *PLANTED, *COSTS), "seed": tuple(range(10))},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"condition": ("clean", "zh"), "seed": (0, 1, 2)},
    quick_sizes=Sizes(prompts=8, start=4, steps=12, cost=8, long_cost=8),
    takes=takes,
)

if __name__ == "__main__":
    main(experiment)
