"""Watch features while a model is trained: a callback for any Transformers or TRL run.

A line of `monitor.jsonl` is one measurement: `step`, `seconds` it took, per layer `drift`, the `moved` features and the
`watched` ones (each with `rate`, `mean`, those at step 0, and `effect`), the `concepts` with the mean `effect` of their
features, and `alarms`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float64
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import HookPoint, Tokens, by_length, capture, context_length, tokenize
from qwen_scope.report import Curves, Line
from qwen_scope.sae import SAE

BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Activity:
    """What the features of a layer do on the probe texts; every array has one number per feature.

    Attributes:
        rate: the share of tokens on which it fires.
        mean: its mean activation over all tokens.
        spread: the standard deviation over texts of its mean activation on a text.
    """

    rate: Float64[np.ndarray, " d_sae"]
    mean: Float64[np.ndarray, " d_sae"]
    spread: Float64[np.ndarray, " d_sae"]

    def effect(self, now: Activity) -> Float64[np.ndarray, " d_sae"]:
        """How far each mean has moved: in its spread over texts at the start, or the median spread if that is larger.

        The median is of the features that fired at the start; so a feature that was silent then, or hardly varied, does
        not move far by moving at all.
        """
        fired = self.spread[self.rate > 0]
        floor = float(np.median(fired)) if len(fired) else 1.0
        return (now.mean - self.mean) / np.maximum(self.spread, floor if floor > 0 else 1.0)

    def drift(self, now: Activity) -> float:
        """One less the cosine between the mean activations then and now: 0 for no change of direction, at most 1."""
        lengths = float(np.linalg.norm(self.mean) * np.linalg.norm(now.mean))
        return max(0.0, 1.0 - float(self.mean @ now.mean) / lengths) if lengths else float(self.mean.any())


@final
class Monitor(TrainerCallback):
    """Measures features on probe texts before, during and after a training run, and says when one has moved far.

    Put it on a trainer with `attach`, which also brings its numbers to the trainer's own loggers; in
    `callbacks=[monitor]` it writes its file alone. Only the first process measures, on its own copy of the model, so
    runs that shard the model (FSDP, DeepSpeed) are refused.

    Args:
        saes: by layer.
        tokenizer: of the model.
        probe: at least two texts, always the same; longer ones are cut to the context.
        out: the folder for `monitor.jsonl` and `monitor_start.npz`.
        watch: per layer the features to report and raise alarms on; None ranks all features and raises no alarm on any.
        labels: what to call features, by layer and index. Watched features of one label are one concept, over all
            layers; one without a label stands for itself.
        every: steps between two measurements. None measures as often as `share` allows.
        share: the part of the run's time that measurements may take, where `every` is None.
        alarm: a concept whose mean effect exceeds this in two measurements in a row, in the same direction, raises an
            alarm, once. One feature in one measurement moves so far in most clean runs.
        drift_alarm: a layer whose drift exceeds this raises one; None for never.
        top: how many of the most moved features to report.
        clock: seconds.

    Raises:
        InputError: fewer than two texts, no SAE, a feature that does not exist, or a cadence that can't be.
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
        every: int | None = None,
        share: float = 0.02,
        alarm: float = 1.0,
        drift_alarm: float | None = None,
        top: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if len(probe) < 2 or not saes:
            raise InputError("a monitor needs at least two probe texts and the SAE of at least one layer")
        if (every is not None and every < 1) or not 0 < share <= 1 or not alarm > 0:
            raise InputError("a monitor measures every step or less often, in a share of the time above 0 and up to 1")
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
        self.alarm, self.drift_alarm, self.top, self.clock = alarm, drift_alarm, top, clock
        self.start: dict[int, Activity] = {}
        self.latest: dict[str, float] = {}
        self._raised: set[tuple[int | None, str | None]] = set()
        self._beyond: dict[str, int] = {}
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
        self.out.mkdir(parents=True, exist_ok=True)
        if state.global_step == 0:
            self.path.unlink(missing_ok=True)
            self._measure(kwargs["model"], 0)
            arrays = {f"{name}_{layer}": getattr(one, name) for layer, one in self.start.items() for name in NAMES}
            np.savez(self.out / "monitor_start.npz", **arrays)
            return
        self.start = read_start(self.out / "monitor_start.npz", list(self.saes))
        for line in read_monitor(self.path):
            self._raised |= {(a["layer"], a["concept"]) for a in line["alarms"]}
            self._beyond = {one["concept"]: self._side(one["effect"]) for one in line["concepts"]}

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
        now = self.measure(model)
        self.start = self.start or now
        layers = [self._layer(layer, now[layer]) for layer in self.saes]
        concepts = self._concepts(layers)
        alarms = self._alarms(layers, concepts, step)
        self._took = self.clock() - begun
        self._spent += self._took
        line = {"step": step, "seconds": self._took, "layers": layers, "concepts": concepts, "alarms": alarms}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
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
        tokens, training = self._tokens, model.training
        totals = {layer: [np.zeros(sae.d_sae) for _ in range(4)] for layer, sae in self.saes.items()}
        model.eval()
        try:
            for rows in by_length(tokens.lengths, BATCH_TOKENS):
                seq = max(tokens.lengths[i] for i in rows)
                ids, mask = tokens.input_ids[rows, :seq], tokens.attention_mask[rows, :seq]
                for point, h in capture(model, ids, [HookPoint(layer) for layer in self.saes], mask).items():
                    add_batch(totals[point.layer], self.saes[point.layer], h, mask)
        finally:
            model.train(training)
        n, texts = sum(tokens.lengths), len(tokens)
        out = {}
        for layer, (fires, total, means, squares) in totals.items():
            variance = np.maximum(0.0, squares / texts - (means / texts) ** 2)
            out[layer] = Activity(fires / n, total / n, np.sqrt(variance))
        return out

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

    def _concepts(self, layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The mean effect on the features of each concept."""
        effects: dict[str, list[float]] = {}
        for entry in layers:
            for one in entry["watched"]:
                effects.setdefault(concept_of(entry["layer"], one), []).append(one["effect"])
        return [{"concept": name, "effect": float(np.mean(values))} for name, values in effects.items()]

    def _side(self, effect: float) -> int:
        """1 or -1 where an effect lies beyond the alarm, up or down; 0 where it does not."""
        return int(np.sign(effect)) if abs(effect) > self.alarm else 0

    def _alarms(
        self, layers: Sequence[Mapping[str, Any]], concepts: Sequence[Mapping[str, Any]], step: int
    ) -> list[dict[str, Any]]:
        """What is raised for the first time: concepts beyond twice in a row, layers that drift."""
        sides = {one["concept"]: self._side(one["effect"]) for one in concepts}
        twice = [name for name, side in sides.items() if side and side == self._beyond.get(name)]
        self._beyond = sides
        found: list[tuple[int | None, str | None]] = [(None, name) for name in twice]
        if self.drift_alarm is not None:
            found += [(entry["layer"], None) for entry in layers if entry["drift"] > self.drift_alarm]
        new = [one for one in found if one not in self._raised]
        self._raised |= set(new)
        return [{"step": step, "layer": layer, "concept": concept} for layer, concept in new]


def concept_of(layer: int, watched: Mapping[str, Any]) -> str:
    """What a watched feature belongs to: its label, or itself."""
    return watched["label"] or f"layer {layer} feature {watched['feature']}"


NAMES = ("rate", "mean", "spread")


def add_batch(totals: Sequence[np.ndarray], sae: SAE, h: torch.Tensor, mask: torch.Tensor) -> None:
    """Add a batch to firings, activations, and sums and squares of the means of texts."""
    here = mask.bool()
    acts = sae.encode(h[here.to(h.device)]).to("cpu")
    on = acts.values > 0
    text = torch.arange(len(mask))[:, None].expand_as(mask)[here][:, None].expand_as(on)[on]
    place = (text * sae.d_sae + acts.indices[on].long()).numpy()
    table = np.bincount(place, acts.values[on].double().numpy(), len(mask) * sae.d_sae).reshape(len(mask), -1)
    means = table / mask.sum(1, keepdim=True).numpy()
    totals[0][:] += np.bincount(acts.indices[on].numpy(), minlength=sae.d_sae)
    totals[1][:] += table.sum(0)
    totals[2][:] += means.sum(0)
    totals[3][:] += (means**2).sum(0)


def read_start(path: Path, layers: Sequence[int]) -> dict[int, Activity]:
    """What step 0 was, for a run that goes on.

    Raises:
        NotFoundError: the file is missing, or lacks a layer.
    """
    if not path.is_file():
        raise NotFoundError(f"the run goes on, but {path} with its step 0 is missing")
    with np.load(path) as kept:
        if lacking := [layer for layer in layers if f"rate_{layer}" not in kept]:
            raise NotFoundError(f"{path} has no step 0 of layer {lacking[0]}")
        return {layer: Activity(*(kept[f"{name}_{layer}"] for name in NAMES)) for layer in layers}


def read_monitor(path: str | Path) -> list[dict[str, Any]]:
    """The measurements of a run, by step.

    Raises:
        NotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise NotFoundError(f"there is no {path}; a Monitor writes it while a model is trained")
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def monitor_figures(lines: Sequence[Mapping[str, Any]]) -> list[Curves]:
    """Drift over steps, a curve per layer; and the effect on the watched concepts, where there are any."""
    steps = [float(line["step"]) for line in lines]
    drift: dict[str, list[float]] = {}
    effect: dict[str, list[float]] = {}
    for line in lines:
        for entry in line["layers"]:
            drift.setdefault(f"layer {entry['layer']}", []).append(entry["drift"])
        for one in line["concepts"]:
            effect.setdefault(one["concept"], []).append(one["effect"])
    curves = [Curves("Drift from step 0", "step", "1 - cosine of mean activations", _lines(steps, drift))]
    if effect:
        said = "mean change of its features, in spreads over texts"
        curves.append(Curves("Watched concepts", "step", said, _lines(steps, effect)))
    return curves


def _lines(steps: Sequence[float], named: Mapping[str, Sequence[float]]) -> list[Line]:
    return [Line(name, steps, values) for name, values in named.items()]
