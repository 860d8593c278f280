"""A rule tried beside the usual classifiers, on the same seeds and the same held-out documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from jaxtyping import Float32

from qwen_scope.report import Curves, Line
from qwen_scope.stats import Permuted, Rates, rates

from .baselines import best_layer, logistic, mean_difference, text_baseline
from .classify import NOISE, Labelled, data_efficiency, evaluate, fit_rule, layer_differences, noise_test
from .result import Result, Table
from .rule import Rule

SIZES = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)

Pooled = Mapping[int, Float32[np.ndarray, "_ d_model"]]


def try_rule(
    seeds: Labelled,
    test: Labelled,
    pooled: Pooled,
    test_pooled: Pooled,
    *,
    top: int | None = None,
    weighted: bool = False,
    several: int = 1,
    fpr: float | None = None,
    name: str = "rule",
    seed: int = 0,
) -> tuple[Rule, Result]:
    """The rule of some seeds, and how it and the baselines do on held-out documents.

    Args:
        pooled, test_pooled: the mean residual of every document, by layer.
        top, weighted, several: as `k`, `weighted` and `several` of `fit_rule`; the other kind of rule is tried beside.
        fpr: calibrate thresholds on the negative seeds.

    Raises:
        InputError: as in `fit_rule`, or documents without texts.
    """
    rule = fit_rule(seeds, top, several=several, weighted=weighted, name=name)
    other = fit_rule(seeds, weighted=not weighted)
    if fpr is not None:
        rule, other = (one.calibrated(seeds.negatives(), fpr) for one in (rule, other))
    noise = noise_test(seeds, seed=seed)
    layer = best_layer(pooled, seeds.labels)
    first, held = next(iter(seeds.layers.values())), next(iter(test.layers.values()))
    results: dict[str, Rates] = {called(one): evaluate(one, test, seed=seed) for one in (rule, other)}
    for said, (positive, scores) in {
        f"logistic, layer {layer}": logistic(pooled[layer], seeds.labels, test_pooled[layer]),
        f"means, layer {layer}": mean_difference(pooled[layer], seeds.labels, test_pooled[layer]),
        "TF-IDF": text_baseline(first.texts or (), seeds.labels, held.texts or ()),
    }.items():
        results[said] = rates(positive, test.labels, scores, seed=seed)
    most = min(int(seeds.labels.sum()), int((~seeds.labels).sum()))
    sizes = [n for n in SIZES if n < most] + [most]
    curve = data_efficiency(seeds, test, sizes, top, seed=seed, weighted=weighted)
    data = {
        "rule": asdict(rule),
        "layers": layer_differences(seeds),
        "noise": asdict(noise),
        "noise_labels": noise.p > NOISE,
        "results": {said: asdict(one) for said, one in results.items()},
        "data_efficiency": {str(n): curve[i].tolist() for i, n in enumerate(sizes)},
    }
    tables = (
        Table(
            "Features",
            ("layer", "feature", "difference", "weight" if weighted else "above"),
            [(f.layer, f.feature, f.delta, f.weight if weighted else f.threshold) for f in rule.features],
        ),
        Table("Top-1 difference by layer", ("layer", "difference"), list(layer_differences(seeds).items())),
        *rates_table("On held-out documents", results),
    )
    line = Line(called(rule), sizes, curve.mean(1).tolist(), curve.min(1).tolist(), curve.max(1).tolist())
    figure = Curves("Seeds needed", "seeds per class", "F1 on held-out documents", [line], log_x=True)
    notes = (noise_note(noise),) if noise.p > NOISE else ()
    return rule, Result(data, tables, (figure,), notes)


def called(rule: Rule) -> str:
    """What tables and figures call it."""
    return f"{len(rule.features)} weighted" if rule.weighted else f"rule of {len(rule.features)}"


def noise_note(noise: Permuted) -> str:
    """What is said where the labels may as well be shuffled."""
    return (
        f"these labels look like noise: the best feature parts the seeds by {noise.found:.3f}, and under shuffled"
        f" labels the best does so by {noise.mean:.3f} on average (p = {noise.p:.2g}); do not use this rule"
    )


def rates_table(title: str, results: dict[str, Rates]) -> tuple[Table, Table]:
    """Rates, and their 95% intervals in a table of their own: together they are wider than a terminal."""
    fixed = next((r.fixed_fpr for r in results.values() if r.fixed_fpr is not None), 0.01)
    columns = ("classifier", "precision", "recall", "F1", "FPR", f"TPR at {fixed:g}")
    measures = {said: (r.precision, r.recall, r.f1, r.fpr, r.tpr_at_fpr) for said, r in results.items()}
    values = [(said, *(None if one is None else one.estimate for one in row)) for said, row in measures.items()]
    ends = [
        (said, *("" if one is None else f"{one.low:.2f}-{one.high:.2f}" for one in row))
        for said, row in measures.items()
    ]
    return Table(title, columns, values), Table("95% intervals", columns, ends)
