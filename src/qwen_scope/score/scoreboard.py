"""`score`: the figures of SAEs with and without sinks, each as a gain over controls."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.files import append_lines, lock_folder, write_text
from qwen_scope.model import HookPoint, LoadedModel, counted_of, load_model, measure_counted
from qwen_scope.report import Progress
from qwen_scope.sae import SAE, load_sae, save_sae
from qwen_scope.scope import Joined, model_source, resolve
from qwen_scope.text import Counted, TokenRows
from qwen_scope.train import evaluate_saes

from .board import FIGURES, WITH, WITHOUT, Scoreboard
from .controls import TRAINED, control
from .folder import (
    CELLS,
    CONFIG,
    arms_of,
    documents,
    held_out,
    kept,
    labelled_data,
    layers_of_run,
    saved,
    suites_of,
    wanted,
)
from .labelled import LabelledData
from .options import ScoreRun
from .suites import SUITES, Inputs


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
    layers = layers_of_run(run, source)
    data = labelled_data(run)
    with lock_folder(run.out):
        found = kept(run) if (run.out / CONFIG).is_file() else {}
        opened = cache(lambda: load_model(model_source(run.model), device=run.device, dtype=run.dtype))
        todo = [one for one in wanted(run, layers) if one not in found]
        if todo:
            _measure(run, opened(), source, todo, found, tell)
        cells: dict[int, dict[str, Any]] = {}
        seconds: dict[int, dict[str, float]] = {}
        for layer, arm in wanted(run, layers):
            one = found[layer, arm]
            cells.setdefault(layer, {})[arm] = {sinks: one[sinks] for sinks in (WITHOUT, WITH)}
            seconds.setdefault(layer, {})[arm] = one["seconds"]
        suites, unmeasured = _measure_suites(run, opened, source, layers, data, tell)
    return Scoreboard(run, cells, seconds, suites, unmeasured)


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
    rows = held_out(run, loaded)
    points = {layer: HookPoint.read_by(sae.hook_point, layer) for layer, sae in saes.items()}
    counted = _counted(run, loaded, saes.values(), points.values(), rows)
    if not (run.out / CONFIG).is_file():  # not before it is known that SAEs and text fit the model
        write_text(run.out / CONFIG, json.dumps(run.to_json(), indent=1, ensure_ascii=False) + "\n")
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


def _measure_suites(
    run: ScoreRun,
    opened: Callable[[], LoadedModel],
    source: str,
    layers: list[int],
    data: LabelledData | None,
    tell: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every suite of every layer and arm, item by item; what the folder holds is read.

    Args:
        opened: gives the model, which is loaded only if something is left to do.
    """
    suites: dict[str, Any] = {}
    unmeasured: dict[str, Any] = {}
    saes: dict[tuple[int, str], SAE] = {}
    inputs: dict[int, Inputs] = {}
    for suite, (known, items, todo) in suites_of(run, data, layers).items():
        for number, (layer, item) in enumerate(todo):
            tell(suite, number / len(todo), f"layer {layer}, {item}")
            if layer not in inputs:
                for arm in arms_of(run):
                    place = source if arm == TRAINED else saved(run, layer, arm)
                    saes[layer, arm] = load_sae(place, layer, device=opened().model.device)
                inputs[layer] = _inputs(run, opened(), saes[layer, TRAINED], layer, data)
            for one in _measured(suite, inputs[layer], item, {arm: saes[layer, arm] for arm in arms_of(run)}, known):
                line = {"layer": layer, "item": item, **one}
                append_lines(run.out / f"{suite}.jsonl", [json.dumps(line)])
                known[layer, item, one["arm"]] = line
        for layer in layers:
            for arm in arms_of(run):
                for item in items:
                    one = known[layer, item, arm]
                    if "why" in one:
                        unmeasured.setdefault(suite, {}).setdefault(layer, {})[item] = one["why"]
                    else:
                        suites.setdefault(suite, {}).setdefault(layer, {}).setdefault(arm, {})[item] = one["figures"]
    return suites, unmeasured


def _measured(
    suite: str, inputs: Inputs, item: str, saes: Mapping[str, SAE], known: Mapping[tuple[int, str, str], Any]
) -> Iterator[dict[str, Any]]:
    """The figures of an item, arm by arm, or for all arms why there are none."""
    how, layer = SUITES[suite], inputs.point.layer
    left = [arm for arm in saes if (layer, item, arm) not in known]
    try:
        prepared = how.read(inputs, item)
    except InputError as why:
        yield from ({"arm": arm, "why": str(why)} for arm in left)
        return
    for arm in left:
        begun = time.monotonic()
        try:
            figures = {name: float(value) for name, value in how.measure(saes[arm], prepared, arm == TRAINED).items()}
        except InputError as why:
            yield {"arm": arm, "why": str(why)}
            continue
        yield {"arm": arm, "figures": figures, "seconds": round(time.monotonic() - begun, 2)}


def _inputs(run: ScoreRun, loaded: LoadedModel, sae: SAE, layer: int, data: LabelledData | None) -> Inputs:
    rows, point = held_out(run, loaded), HookPoint.read_by(sae.hook_point, layer)
    return Inputs(run, loaded, point, _counted(run, loaded, [sae], [point], rows), rows, data)


def _counted(
    run: ScoreRun, loaded: LoadedModel, saes: Iterable[SAE], points: Iterable[HookPoint], rows: list[Tensor]
) -> Counted:
    """Which tokens count: as the SAEs' files say, or as it is measured."""
    known = counted_of(saes)
    return known or measure_counted(loaded.model, loaded.tokenizer, rows, points, sample=run.data)


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
    place = saved(run, layer, arm)
    if not place.is_dir():
        corpus = documents(run, shuffle=run.seed, repeat=True, quiet=True)
        rows = TokenRows(corpus, loaded.tokenizer, context_length=run.context_length, batch_size=run.batch_size)
        k = sae.k or max(1, round(found[layer, TRAINED][WITHOUT]["l0"]))
        sizes = {"tokens": run.train_tokens, "batch": run.batch, "budget": run.budget, "seed": run.seed}
        save_sae(control(arm, sae, k, loaded.model, rows, point, counted, **sizes), place, layout="safetensors")
    return load_sae(place, layer, device=loaded.model.device)
