"""`score`: the figures of SAEs with and without sinks, each as a gain over controls."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.files import append_lines, lock_folder, read_lines, read_object, write_text
from qwen_scope.model import HookPoint, LoadedModel, counted_of, load_model, measure_counted
from qwen_scope.report import Progress
from qwen_scope.sae import SAE, layers_of, load_sae, save_sae
from qwen_scope.scope import Joined, model_source, resolve
from qwen_scope.text import Corpus, Counted, TokenRows
from qwen_scope.train import evaluate_saes

from .controls import ARMS, TRAINED, control
from .options import ScoreRun
from .probe_data import ProbeData
from .probing import probe, read_split

WITH, WITHOUT = "with sinks", "without sinks"
FIGURES: dict[str, int] = {
    "explained_variance": 1, "explained_variance_per_token": 1, "cosine": 1, "l0": 0, "dead": -1, "ce_recovered": 1,
    "ce_spliced": -1, "kl": -1, "kl_recovered": 1,
}  # fmt: skip
"""What is measured, and whether more (1) or less (-1) of it is better; 0 where neither is."""
CONFIG, CELLS, PROBES = "score.json", "cells.jsonl", "probes.jsonl"


@dataclass(frozen=True)
class Cost:
    """What a scoreboard takes, before it runs.

    Attributes:
        layers: how many.   done: how many of its `cells` the folder holds.
        measured: tokens that go through the whole model to measure.   trained: tokens that are trained on, whose
            residuals are read once per control.
    """

    layers: int
    cells: int
    done: int
    measured: int
    trained: int


@dataclass(frozen=True, eq=False)
class Scoreboard:
    """The figures.

    Attributes:
        run: what was asked for.
        cells: by layer, arm and `with sinks` or `without sinks` the figures by name.
        seconds: by layer and arm, training of the control included.
        probes: by layer, arm and dataset what sparse probing gave: AUROC by k, and of the trained SAE also `residual`.
    """

    run: ScoreRun
    cells: Mapping[int, Mapping[str, Mapping[str, Mapping[str, float]]]]
    seconds: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    probes: Mapping[int, Mapping[str, Mapping[str, Mapping[str, float]]]] = field(default_factory=dict)

    def gain(self, layer: int, arm: str, sinks: str, figure: str) -> float:
        """How much better the SAE is than a control, counted so that more is better; NaN where neither is better."""
        sign = FIGURES[figure]
        both = [self.cells[layer][one][sinks][figure] for one in (TRAINED, arm)]
        return sign * (both[0] - both[1]) + 0.0 if sign else float("nan")  # no -0.0

    def not_better(self) -> list[tuple[int, str, str, str]]:
        """Where a control does as well as the SAE or better: layer, control, sinks and figure."""
        return [
            (layer, arm, sinks, figure)
            for layer, arms in self.cells.items()
            for arm in arms
            if arm != TRAINED
            for sinks in (WITHOUT, WITH)
            for figure, sign in FIGURES.items()
            if sign and self.gain(layer, arm, sinks, figure) <= 0
        ]

    def rows(self, layer: int, sinks: str) -> list[tuple[str, float, list[tuple[str, float, float]]]]:
        """Per figure the SAE's value, and per control its value and the gain over it."""
        arms = [arm for arm in self.cells[layer] if arm != TRAINED]
        own = self.cells[layer][TRAINED][sinks]
        return [
            (
                name,
                own[name],
                [(arm, self.cells[layer][arm][sinks][name], self.gain(layer, arm, sinks, name)) for arm in arms],
            )
            for name in FIGURES
        ]

    def probe_rows(self, layer: int) -> list[tuple[str, float, list[tuple[str, float, float]]]]:
        """As `rows`, for the mean AUROC over datasets by how many features a probe has, and of the residual."""
        found = {arm: {name: float(np.mean([one[name] for one in sets.values()])) for name in next(iter(sets.values()))}
                 for arm, sets in self.probes.get(layer, {}).items()}  # fmt: skip
        own = found.get(TRAINED, {})
        arms = [arm for arm in found if arm != TRAINED]
        return [
            (
                name,
                value,
                [(arm, found[arm].get(name, math.nan), value - found[arm].get(name, math.nan)) for arm in arms],
            )
            for name, value in own.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        probes = {str(layer): {arm: dict(sets) for arm, sets in arms.items()} for layer, arms in self.probes.items()}
        gains = {
            str(layer): {
                arm: {sinks: {f: _plain(self.gain(layer, arm, sinks, f)) for f in FIGURES} for sinks in (WITHOUT, WITH)}
                for arm in arms
                if arm != TRAINED
            }
            for layer, arms in self.cells.items()
        }
        weak = [dict(zip(("layer", "control", "sinks", "figure"), one, strict=True)) for one in self.not_better()]
        layers = {str(layer): {arm: dict(found) for arm, found in arms.items()} for layer, arms in self.cells.items()}
        seconds = {str(layer): dict(found) for layer, found in self.seconds.items()}
        return {"run": self.run.to_json(), "layers": layers, "gains": gains, "not_better": weak, "seconds": seconds,
                "probes": probes}  # fmt: skip


def cost(run: ScoreRun) -> Cost:
    """What a run takes; nothing is loaded but lists of layers, and what the folder holds is taken off.

    Raises:
        NotFoundError: no such SAEs or layer.   MismatchError: the folder holds another scoreboard.
    """
    layers = _layers(run, resolve(run.model, run.sae)[1])
    found = _kept(run) if (run.out / CONFIG).is_file() else {}
    wanted = _wanted(run, layers)
    left = [one for one in wanted if one not in found]
    # Two passes for means and reconstructions, then clean, spliced and zeroed; with and without sinks.
    measured = len(left) * 2 * 5 * run.tokens
    trained = sum(arm != TRAINED and not _saved(run, layer, arm).is_dir() for layer, arm in left) * run.train_tokens
    return Cost(len(layers), len(wanted), len(wanted) - len(left), measured, trained)


def score(run: ScoreRun, progress: Progress | None = None) -> Scoreboard:
    """Measure SAEs and their controls; a run that was stopped goes on where it was.

    Every figure is that of `evaluate_saes`, once with the tokens that count by the SAE's files, or as they are measured
    (without sinks), and once with all tokens (with sinks).

    Args:
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        QwenScopeError: with one sentence, before the model runs where the cause can be known before.
    """
    tell = progress or (lambda stage, share, text: None)
    source = resolve(run.model, run.sae)[1]
    layers = _layers(run, source)
    with lock_folder(run.out):
        found = _begin(run)
        opened = cache(lambda: load_model(model_source(run.model), device=run.device, dtype=run.dtype))
        todo = [one for one in _wanted(run, layers) if one not in found]
        if todo:
            _measure(run, opened(), source, todo, found, tell)
        cells: dict[int, dict[str, Any]] = {}
        seconds: dict[int, dict[str, float]] = {}
        for layer, arm in _wanted(run, layers):
            one = found[layer, arm]
            cells.setdefault(layer, {})[arm] = {sinks: one[sinks] for sinks in (WITHOUT, WITH)}
            seconds.setdefault(layer, {})[arm] = one["seconds"]
        probed = _probe(run, opened, source, layers, tell)
    return Scoreboard(run, cells, seconds, probed)


def _measure(
    run: ScoreRun,
    loaded: LoadedModel,
    source: str,
    todo: list[tuple[int, str]],
    found: dict[tuple[int, str], Any],
    tell: Progress,
) -> None:
    joined, saes = Joined(loaded, source), {}
    for layer in sorted({layer for layer, _ in todo}):
        saes[layer] = joined.meet(layer, load_sae(source, layer, device=loaded.model.device))
    rows = _held_out(run, loaded)
    points = {layer: HookPoint.read_by(sae.hook_point, layer) for layer, sae in saes.items()}
    counted = counted_of(saes.values())
    if counted is None:
        counted = measure_counted(loaded.model, loaded.tokenizer, rows, points.values(), sample=run.data)
    for number, (layer, arm) in enumerate(todo):
        begun = time.monotonic()
        tell("score", number / len(todo), f"layer {layer}, {arm}")
        sae = _arm(run, loaded, saes[layer], layer, arm, points[layer], counted, found)
        figures = {
            sinks: _figures(loaded, points[layer], sae, rows, which)
            for sinks, which in ((WITHOUT, counted), (WITH, Counted.everything()))
        }
        one = {"layer": layer, "arm": arm, **figures, "seconds": round(time.monotonic() - begun, 2)}
        append_lines(run.out / CELLS, [json.dumps(one)])
        found[layer, arm] = one
    tell("score", 1.0, "")


def _probe(
    run: ScoreRun, opened: Callable[[], LoadedModel], source: str, layers: list[int], tell: Progress
) -> dict[int, Any]:
    """Sparse probing of every layer and arm, dataset by dataset; what the folder holds is read.

    Args:
        opened: gives the model, which is loaded only if something is left to do.
    """
    if run.probes is None:
        return {}
    data = ProbeData(run.probes)
    names = list(run.datasets or data.names)
    if unknown := [name for name in names if name not in data.files]:
        data.read(unknown[0])  # it says which there are
    path = run.out / PROBES
    known = {(one["layer"], one["arm"], one["dataset"]): one["auroc"] for one in map(json.loads, read_lines(path))}
    arms = ARMS if run.controls else (TRAINED,)
    wanted = [(layer, name) for layer in layers for name in names]
    todo = [(layer, name) for layer, name in wanted if any((layer, arm, name) not in known for arm in arms)]
    saes: dict[tuple[int, str], SAE] = {}
    for number, (layer, name) in enumerate(todo):
        loaded = opened()
        tell("probes", number / len(todo), f"layer {layer}, {name}")
        for arm in arms:
            if (layer, arm) not in saes:
                place = source if arm == TRAINED else _saved(run, layer, arm)
                saes[layer, arm] = load_sae(place, layer, device=loaded.model.device)
        point = HookPoint.read_by(saes[layer, TRAINED].hook_point, layer)
        split = read_split(loaded, point, data.read(name), rows=run.rows, batch=run.batch_size)
        for arm in arms:
            one = probe(saes[layer, arm], split, name, baseline=arm == TRAINED)
            auroc = {str(k): value for k, value in one.features.items()}
            if one.residual is not None:
                auroc["residual"] = one.residual
            sizes = {"train": one.train, "test": one.test}
            append_lines(path, [json.dumps({"layer": layer, "arm": arm, "dataset": name, **sizes, "auroc": auroc})])
            known[layer, arm, name] = auroc
    return {layer: {arm: {name: known[layer, arm, name] for name in names} for arm in arms} for layer in layers}


def _figures(loaded: LoadedModel, point: HookPoint, sae: SAE, rows: list[Tensor], counted: Counted) -> dict[str, float]:
    quality = evaluate_saes(loaded.model, {point: sae}, rows, counted=counted)[point]
    assert quality.loss is not None, "it was measured"
    found = {**asdict(quality.reconstruction), **asdict(quality.loss), "kl_recovered": quality.loss.kl_recovered}
    return {name: float(found[name]) for name in FIGURES}


def _arm(
    run: ScoreRun,
    loaded: LoadedModel,
    sae: SAE,
    layer: int,
    arm: str,
    point: HookPoint,
    counted: Counted,
    found: Mapping[tuple[int, str], Any],
) -> SAE:
    """The SAE itself, or a control: read where it was trained before."""
    if arm == TRAINED:
        return sae
    place = _saved(run, layer, arm)
    if not place.is_dir():
        corpus = Corpus.of(run.data, run.corpus, hold_out=run.hold_out, repeat=True, quiet=True)
        rows = TokenRows(corpus, loaded.tokenizer, context_length=run.context_length, batch_size=run.batch_size)
        k = sae.k or max(1, round(found[layer, TRAINED][WITHOUT]["l0"]))
        sizes = {"tokens": run.train_tokens, "batch": run.batch, "budget": run.budget, "seed": run.seed}
        save_sae(control(arm, sae, k, loaded.model, rows, point, counted, **sizes), place, layout="safetensors")
    return load_sae(place, layer, device=loaded.model.device)


def _held_out(run: ScoreRun, loaded: LoadedModel) -> list[Tensor]:
    """Rows of the documents that no control is trained on."""
    corpus = Corpus.of(run.data, run.corpus, hold_out=run.hold_out, held_out=True)
    rows = TokenRows(corpus, loaded.tokenizer, context_length=run.context_length, batch_size=run.batch_size)
    found = rows.take(run.tokens)
    if not found:
        raise InputError(
            f"the held-out text of {corpus.name} does not fill one row of {run.context_length} tokens; lower"
            " context_length or hold_out"
        )
    return found


def _layers(run: ScoreRun, source: str) -> list[int]:
    there = layers_of(source)
    if bad := [layer for layer in run.layers or () if layer not in there]:
        raise NotFoundError(f"{source} has no layer {bad[0]}; it has layers {', '.join(map(str, there))}")
    return sorted(run.layers or there)


def _wanted(run: ScoreRun, layers: list[int]) -> list[tuple[int, str]]:
    return [(layer, arm) for layer in layers for arm in (ARMS if run.controls else (TRAINED,))]


def _saved(run: ScoreRun, layer: int, arm: str) -> Path:
    return run.out / "controls" / arm.replace(" ", "-") / f"layer{layer}"


def _begin(run: ScoreRun) -> dict[tuple[int, str], Any]:
    """What the folder holds of this run; its settings are written where it is new."""
    if (run.out / CONFIG).is_file():
        return _kept(run)
    write_text(run.out / CONFIG, json.dumps(run.to_json(), indent=1, ensure_ascii=False) + "\n")
    return {}


def _kept(run: ScoreRun) -> dict[tuple[int, str], Any]:
    known, mine = read_object(run.out / CONFIG), json.loads(json.dumps(run.to_json()))
    if other := [name for name in mine if known.get(name) != mine[name]]:
        raise MismatchError(
            f"{run.out} holds a scoreboard with {other[0]} {known.get(other[0])!r:.80}, not {mine[other[0]]!r:.80};"
            " name another folder with out="
        )
    return {(one["layer"], one["arm"]): one for one in map(json.loads, read_lines(run.out / CELLS))}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
