"""Watch features while a model is trained: a callback for any Transformers or TRL run.

A line of `monitor.jsonl` is one measurement: `step`, `seconds` it took, per layer `drift`, the `moved` features and the
`watched` ones (each with `rate`, `mean`, those at step 0, and `effect`), the `concepts` with the mean `effect` of their
features and by how much their `rise_in_generation` is above the start (null without probe prompts), and `alarms`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from qwen_scope.errors import InputError, NotFoundError, check_count, check_positive, foreign
from qwen_scope.files import Fields, append_lines, parse_object, read_lines, write_whole
from qwen_scope.model import context_length
from qwen_scope.report import Curves, Line
from qwen_scope.sae import SAE
from qwen_scope.text import Tokens, tokenize

from .activity import Activity, activity_of
from .answers import ProbePrompts, rise_in_generation, written
from .runs import hold, keep_lines, release

NAMES = ("rate", "mean", "spread")

READINGS = {
    "effect": ("Watched concepts", "mean change of its features, in spreads over texts"),
    "rise_in_generation": (
        "Watched concepts in the model's answers",
        "rise in the share of answers that hold it, in standard errors",
    ),
}
"""What is read of a concept: the title and the unit of its curve."""


@final
class Monitor(TrainerCallback):
    """Measures features before, during and after a training run, and says when one has moved far.

    It reads texts, always the same, and if it is given prompts what the model answers to them. The first shows early
    what a feature's place in given text says; the second shows what the model has begun to write.

    Put it on a trainer with `attach`, which also brings its numbers to the trainer's own loggers; in
    `callbacks=[monitor]` it writes its file alone. Only the first process measures, on its own copy of the model, so
    runs that shard the model (FSDP, DeepSpeed) are refused.

    Args:
        saes: by layer.
        tokenizer: of the model.
        probe: at least two texts, always the same; longer ones are cut to the context.
        out: the folder for `monitor.jsonl` and `monitor_start.npz`; it is held as their only writer while a model is
            trained.
        held: the caller holds the folder already.
        watch: per layer the features to report and raise alarms on; None ranks all features and raises no alarm on any.
        labels: what to call features, by layer and index. Watched features of one label are one concept, over all
            layers; one without a label stands for itself.
        every: steps between two measurements. None measures as often as `share` allows.
        share: the part of the run's time that measurements may take, where `every` is None.
        probe_prompts: prompts that the model answers at every measurement; the watched features are read on these
            answers.
        alarm: a concept whose mean effect exceeds this in two measurements in a row, in the same direction, raises an
            alarm, once. One feature in one measurement moves so far in most clean runs.
        rise_in_generation: so does a concept that the model writes more often than at the start, by this many standard
            errors.
        drift_alarm: a layer whose drift exceeds this raises one; None for never.
        top: how many of the most moved features to report.
        clock: seconds.

    Raises:
        InputError: fewer than two texts, no SAE, a feature that does not exist, a cadence that can't be, or
            prompts where nothing is watched.
    """

    def __init__(
        self,
        saes: Mapping[int, SAE],
        tokenizer: PreTrainedTokenizerBase,
        probe: Sequence[str],
        out: str | Path,
        *,
        watch: Mapping[int, Sequence[int]] | None = None,
        labels: Mapping[tuple[int, int], str] | None = None,
        probe_prompts: ProbePrompts | None = None,
        every: int | None = None,
        share: float = 0.02,
        alarm: float = 1.0,
        rise_in_generation: float = 3.0,
        drift_alarm: float | None = None,
        top: int = 10,
        held: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if len(probe) < 2 or not saes:
            raise InputError("a monitor needs at least two probe texts and the SAE of at least one layer")
        if (every is not None and every < 1) or not 0 < share <= 1:
            raise InputError("a monitor measures every step or less often, in a share of the time above 0 and up to 1")
        if every is not None:
            check_count("every", every)
        check_count("top", top, 0)
        check_positive("share", share)
        bounds = {"alarm": alarm, "rise_in_generation": rise_in_generation, "drift_alarm": drift_alarm}
        for name, bound in bounds.items():
            if bound is not None:
                check_positive(name, bound)
        if probe_prompts is not None and not watch:
            raise InputError("answers are read by the features that are watched; name some, or ask nothing")
        for layer, features in (watch or {}).items():
            if layer not in saes:
                raise NotFoundError(f"features of layer {layer} are watched, but there is no SAE for it")
            if bad := [f for f in features if not 0 <= f < saes[layer].d_sae]:
                raise InputError(
                    f"feature {bad[0]} does not exist: layer {layer} has features 0 to {saes[layer].d_sae - 1}"
                )
        self.saes, self.tokenizer, self.probe, self.out = dict(saes), tokenizer, list(probe), Path(out)
        self.watch = None if watch is None else {layer: list(features) for layer, features in watch.items()}
        self.labels, self.every, self.share = dict(labels or {}), every, share
        self.probe_prompts, self.beyond = probe_prompts, {"effect": alarm, "rise_in_generation": rise_in_generation}
        self.drift_alarm, self.top, self.held, self.clock = drift_alarm, top, held, clock
        self.start: dict[int, Activity] = {}
        self.start_answers: dict[str, np.ndarray] = {}
        self.latest: dict[str, float] = {}
        self._raised: set[tuple[int | None, str | None]] = set()
        self._sides: dict[tuple[str, str], int] = {}
        self._turn = 0
        self._tokens: Tokens | None = None
        self._begun, self._took, self._spent = clock(), 0.0, 0.0

    def attach(self, trainer: Trainer) -> Monitor:
        """Put the monitor in front of the trainer's loggers, so that they log its numbers with their own."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    @property
    def path(self) -> Path:
        """The file of measurements."""
        return self.out / "monitor.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what step 0 is, or take it from the file where a run goes on."""
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise InputError("the monitor measures on one whole copy of the model; FSDP and DeepSpeed split it")
        if not state.is_world_process_zero:
            return
        self._begun = self.clock()
        if not self.held:
            hold(self.out)
        if state.global_step == 0:
            self.path.unlink(missing_ok=True)
            self._measure(kwargs["model"], 0)
            kept = {f"{name}_{layer}": getattr(one, name) for layer, one in self.start.items() for name in NAMES}
            kept |= {f"answers_{name}": values for name, values in self.start_answers.items()}
            with write_whole(self.out / "monitor_start.npz") as part:
                np.savez(part, allow_pickle=False, **kept)
            return
        concepts = list(self.concepts()) if self.probe_prompts else []
        self.start, self.start_answers = read_start(self.out / "monitor_start.npz", list(self.saes), concepts)
        # What was measured after the checkpoint will be measured again.
        lines = [line for line in read_monitor(self.path) if line["step"] <= state.global_step]
        keep_lines(self.path, [json.dumps(line, ensure_ascii=False) for line in lines])
        self._turn = len(lines) - 1 + (self.probe_prompts.at_start if self.probe_prompts else 0)
        for line in lines:
            self._raised |= {(a["layer"], a["concept"]) for a in line["alarms"]}
            self._sides = self._beyond(line["concepts"])
        if lines[-1]["step"] > max((entry["step"] for entry in state.log_history), default=-1):
            self._hand_over(lines[-1]["layers"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time."""
        if state.is_world_process_zero and self._due(state.global_step):
            self._measure(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure what the run has come to."""
        if (
            state.is_world_process_zero
            and self.path.is_file()
            and read_monitor(self.path)[-1]["step"] < state.global_step
        ):
            self._measure(kwargs["model"], state.global_step)
        if not self.held:
            release(self.out)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Hand the latest numbers to the loggers that come after."""
        if logs is not None:
            logs.update(self.latest)
            self.latest = {}

    def _due(self, step: int) -> bool:
        if self.every is not None:
            return step % self.every == 0
        # What was measured, this one and the one at the end: all of it keeps to the share.
        return self._spent + 2 * self._took <= self.share * (self.clock() - self._begun)

    def _measure(self, model: Any, step: int) -> None:
        begun = self.clock()
        now, measured, turn = self.measure(model), self.clock(), self._turn
        answers, answered = self.answers(model), self.clock()
        self.start, self.start_answers = self.start or now, self.start_answers or answers
        layers = [self._layer(layer, now[layer]) for layer in self.saes]
        concepts = self._concepts(layers, answers)
        alarms = self._alarms(layers, concepts, step)
        seconds = self.clock() - begun
        self._spent += seconds
        # What the next one will take: it has one answer per prompt, where the first had several.
        self._took = seconds - (answered - measured) * (1 - 1 / max(1, self._turn - turn))
        line = {"step": step, "seconds": seconds, "layers": layers, "concepts": concepts, "alarms": alarms}
        append_lines(self.path, [json.dumps(line, ensure_ascii=False)])
        self._hand_over(layers)

    def _hand_over(self, layers: Sequence[Mapping[str, Any]]) -> None:
        """Keep the numbers of a measurement for the next line of the log."""
        self.latest = {"monitor/alarms": float(len(self._raised))}
        for entry in layers:
            self.latest[f"monitor/drift_{entry['layer']}"] = entry["drift"]
            for one in entry["watched"]:
                self.latest[f"monitor/mean_{entry['layer']}_{one['feature']}"] = one["mean"]

    def measure(self, model: Any) -> dict[int, Activity]:
        """What the features do on the probe texts right now; the model's mode is left as it was."""
        if self._tokens is None:
            longest = context_length(model)
            self._tokens = tokenize(self.tokenizer, self.probe, max_length=longest, truncate=True)
        return activity_of(model, self.saes, self._tokens)

    def answers(self, model: Any) -> dict[str, np.ndarray]:
        """How much of every concept the answers hold that the model gives right now; with each call other draws."""
        if self.probe_prompts is None:
            return {}
        turns = range(self._turn, self._turn + (1 if self.start_answers else self.probe_prompts.at_start))
        self._turn = turns.stop
        return written(model, self.tokenizer, self.saes, self.concepts(), self.probe_prompts, turns)

    def concepts(self) -> dict[str, dict[int, list[int]]]:
        """The watched features by concept and layer."""
        found: dict[str, dict[int, list[int]]] = {}
        for layer, features in (self.watch or {}).items():
            for f in features:
                name = concept_of(layer, f, self.labels.get((layer, f)))
                found.setdefault(name, {}).setdefault(layer, []).append(f)
        return found

    def _layer(self, layer: int, now: Activity) -> dict[str, Any]:
        """What is written of one layer."""
        before = self.start[layer]
        effect = before.effect(now)
        watched = None if self.watch is None else self.watch.get(layer, [])
        known = np.arange(len(effect)) if watched is None else np.asarray(watched, np.int64)
        order = known[np.argsort(-np.abs(effect[known]), kind="stable")]

        def entry(feature: int) -> dict[str, Any]:
            found = {"feature": feature, "label": self.labels.get((layer, feature)), "effect": float(effect[feature])}
            found |= {"rate": float(now.rate[feature]), "rate_start": float(before.rate[feature])}
            return {**found, "mean": float(now.mean[feature]), "mean_start": float(before.mean[feature])}

        return {
            "layer": layer,
            "drift": before.drift(now),
            "moved": [entry(int(f)) for f in order[: self.top]],
            "watched": [entry(f) for f in watched or []],
        }

    def _concepts(self, layers: Sequence[Mapping[str, Any]], answers: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """The mean effect on the features of each concept, and how much more of it is written."""
        effects: dict[str, list[float]] = {}
        for entry in layers:
            for one in entry["watched"]:
                effects.setdefault(concept_of(entry["layer"], one["feature"], one["label"]), []).append(one["effect"])
        said = {name: rise_in_generation(self.start_answers[name], values) for name, values in answers.items()}
        return [
            {"concept": name, "effect": float(np.mean(values)), "rise_in_generation": said.get(name)}
            for name, values in effects.items()
        ]

    def _beyond(self, concepts: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], int]:
        """Per concept and reading 1 or -1 where it lies beyond the alarm, up or down; 0 where it does not."""
        found = {}
        for one in concepts:
            for reading, limit in self.beyond.items():
                value = one.get(reading) or 0.0
                found[one["concept"], reading] = int(np.sign(value)) if abs(value) > limit else 0
        return found

    def _alarms(
        self, layers: Sequence[Mapping[str, Any]], concepts: Sequence[Mapping[str, Any]], step: int
    ) -> list[dict[str, Any]]:
        """What is raised for the first time: concepts beyond twice in a row, layers that drift."""
        before, self._sides = self._sides, self._beyond(concepts)
        twice = [name for (name, reading), side in self._sides.items() if side and side == before.get((name, reading))]
        found: list[tuple[int | None, str | None]] = [(None, name) for name in dict.fromkeys(twice)]
        if self.drift_alarm is not None:
            found += [(entry["layer"], None) for entry in layers if entry["drift"] > self.drift_alarm]
        new = [one for one in found if one not in self._raised]
        self._raised |= set(new)
        return [{"step": step, "layer": layer, "concept": concept} for layer, concept in new]


def concept_of(layer: int, feature: int, label: str | None) -> str:
    """What a watched feature belongs to: its label, or itself."""
    return label or f"layer {layer} feature {feature}"


def read_start(
    path: Path, layers: Sequence[int], concepts: Sequence[str]
) -> tuple[dict[int, Activity], dict[str, np.ndarray]]:
    """What step 0 was, for a run that goes on: activity by layer, and what the answers held.

    Raises:
        NotFoundError: the file is missing, or lacks a layer or a concept.
    """
    if not path.is_file():
        raise NotFoundError(f"the run goes on, but {path} with its step 0 is missing")
    with foreign(f"{path} can't be read"), np.load(path) as kept:
        if lacking := [layer for layer in layers if f"rate_{layer}" not in kept]:
            raise NotFoundError(f"{path} has no step 0 of layer {lacking[0]}")
        if unread := [name for name in concepts if f"answers_{name}" not in kept]:
            raise NotFoundError(f"{path} has no answers of step 0 that were read for {unread[0]!r}")
        activity = {layer: Activity(*(kept[f"{name}_{layer}"] for name in NAMES)) for layer in layers}
        return activity, {name: kept[f"answers_{name}"] for name in concepts}


def read_monitor(path: str | Path) -> list[dict[str, Any]]:
    """The measurements of a run, by step.

    Raises:
        NotFoundError: there is no such file.   FormatError: a line is none of a monitor's.
    """
    if not Path(path).is_file():
        raise NotFoundError(f"there is no {path}; a Monitor writes it while a model is trained")
    out = []
    for number, line in enumerate(read_lines(path), 1):
        one = Fields(parse_object(line, f"line {number} of {path}"), f"line {number} of {path}")
        one.count("step")
        for name in ("layers", "concepts", "alarms"):
            one.items(name)
        out.append(dict(one.data))
    return out


def monitor_figures(lines: Sequence[Mapping[str, Any]]) -> list[Curves]:
    """Drift over steps, a curve per layer; the watched concepts on the probe texts, and in the model's own answers."""
    steps = [float(line["step"]) for line in lines]
    drift: dict[str, list[float]] = {}
    readings: dict[str, dict[str, list[float]]] = {reading: {} for reading in READINGS}
    for line in lines:
        for entry in line["layers"]:
            drift.setdefault(f"layer {entry['layer']}", []).append(entry["drift"])
        for one in line["concepts"]:
            for reading, named in readings.items():
                if one.get(reading) is not None:
                    named.setdefault(one["concept"], []).append(one[reading])
    curves = [Curves("Drift from step 0", "step", "1 - cosine of mean activations", _lines(steps, drift))]
    for reading, named in readings.items():
        if named:
            curves.append(Curves(READINGS[reading][0], "step", READINGS[reading][1], _lines(steps, named)))
    return curves


def _lines(steps: Sequence[float], named: Mapping[str, Sequence[float]]) -> list[Line]:
    return [Line(name, steps, values) for name, values in named.items()]
