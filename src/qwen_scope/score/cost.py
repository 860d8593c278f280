"""What a scoreboard takes, before it runs: tokens, and by a few timed rows the time on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen_scope.model import HookPoint, capture, load_model
from qwen_scope.sae import load_sae
from qwen_scope.scope import Joined, model_source, resolve
from qwen_scope.text import Counted, TokenRows
from qwen_scope.train import evaluate_saes

from .controls import TRAINED, control, tokens_to_train
from .folder import CONFIG, arms_of, documents, held_out, kept, labelled_data, layers_of_run, saved, suites_of, wanted
from .options import ScoreRun
from .suites import tokens_of

WHOLE = ("steering",)
"""Suites whose tokens go through the whole model; the others read up to the SAE's layer."""


@dataclass(frozen=True)
class Cost:
    """What a scoreboard takes, before it runs.

    Attributes:
        layers: how many.   done: how many of its `cells` the folder holds.
        read: tokens that are read up to the SAE's layer to measure reconstructions.
        measured: tokens that go through the whole model to compare its predictions.
        trained: tokens that are trained on, whose residuals are read once per control.
        suites: by suite about how many tokens are read, in all but `WHOLE` up to the SAE's layer.
        minutes: by stage (`reconstruction`, `controls` or a suite) how long it would take on this machine, if that was
            measured; of suites the reading, without fits and ablations.
    """

    layers: int
    cells: int
    done: int
    read: int
    measured: int
    trained: int
    suites: Mapping[str, int] = field(default_factory=dict)
    minutes: Mapping[str, float] | None = None


def cost(run: ScoreRun, timed: bool = False) -> Cost:
    """What a run takes; what the folder holds is taken off.

    Args:
        timed: also load the model, and time a few rows; else nothing is loaded but lists of layers.

    Raises:
        NotFoundError: no such SAEs or layer.   MismatchError: the folder holds another scoreboard.
        QwenScopeError: where `timed`, whatever keeps the model from being loaded and read.
    """
    layers = layers_of_run(run, resolve(run.model, run.sae)[1])
    found = kept(run) if (run.out / CONFIG).is_file() else {}
    every = wanted(run, layers)
    left = [one for one in every if one not in found]
    missing = [arm for layer, arm in left if arm != TRAINED and not saved(run, layer, arm).is_dir()]
    batch = run.batch_size * run.context_length
    each = len(left) * 2 * max(1, run.tokens // batch) * batch  # whole batches, with and without sinks
    read, measured = 2 * each, 3 * each  # means and reconstructions; clean, spliced and zeroed
    trained = sum(tokens_to_train(arm, run.train_tokens, run.batch) for arm in missing)
    data = labelled_data(run)
    known: dict[int, set[str]] = {layer: set() for layer in layers}
    suites = {
        suite: sum(tokens_of(suite, run, data, item, len(arms_of(run)), known[layer]) for layer, item in todo)
        for suite, (_, _, todo) in suites_of(run, data, layers).items()
    }
    minutes = None
    if timed:
        speed = _speeds(run, max(layers), bool(missing))
        minutes = {"reconstruction": each / speed["measured"] / 60}
        minutes |= {"controls": trained / speed["trained"] / 60} if missing else {}
        # Measuring a token takes about the time of four that go through the whole model.
        minutes |= {s: n / (4 * speed["measured"] if s in WHOLE else speed["read"]) / 60 for s, n in suites.items()}
    return Cost(len(layers), len(every), len(every) - len(left), read, measured, trained, suites, minutes)


def _speeds(run: ScoreRun, layer: int, trains: bool) -> dict[str, float]:
    """Tokens a second that are read up to a layer, measured with all passes that takes, and trained on."""
    source = resolve(run.model, run.sae)[1]
    loaded = load_model(model_source(run.model), device=run.device, dtype=run.dtype)
    sae = Joined(loaded, source).meet(layer, load_sae(source, layer, device=loaded.model.device))
    point, ids = HookPoint.read_by(sae.hook_point, layer), held_out(run, loaded)[0]
    few = ids[:2]

    def read() -> Any:
        with torch.no_grad():
            return capture(loaded.model, ids, [point])

    found = {
        "read": ids.numel() / _seconds(read),
        "measured": few.numel() / _seconds(lambda: evaluate_saes(loaded.model, {point: sae}, [few])),
    }
    if trains:
        batch = min(run.batch, 1024)
        k = sae.k or run.batch_size

        def train(arm: str) -> Any:
            corpus = documents(run, shuffle=run.seed, repeat=True, quiet=True)
            rows = TokenRows(corpus, loaded.tokenizer, context_length=run.context_length, batch_size=run.batch_size)
            sizes = {"tokens": 3 * batch, "batch": batch, "budget": run.budget, "seed": run.seed}
            return control(arm, sae, k, loaded.model, rows, point, Counted(), **sizes)

        # Both draw a dictionary and fit it to the first batch; the first reads and trains on two more.
        more = _seconds(lambda: train("frozen decoder")) - _seconds(lambda: train("random directions"))
        found["trained"] = 2 * batch / max(more, 2 * batch / found["read"])
    return found


def _seconds(work: Callable[[], Any]) -> float:
    """How long something takes the second time."""
    work()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
