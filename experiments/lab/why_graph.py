"""The graph that `qwen-scope why` makes by default, and every method by itself, under the same three criteria.

    python -m experiments.lab.why_graph [--set chosen-on] [--write]

Prompts and quantities are those of `experiments.lab.why`, with other seeds. The default graph chooses features by what
they add while those of all layers grow together and tells their effects by gradient, because which features carry a
quantity together and what is lost without one of them are two questions. A method by itself ranks all active features
by its own effects: by size for the correlation, by sign for the strongest and for faithful sets (joint) or by size
(the others, as in `experiments.lab.why`).

Criteria, fixed before the run that is reported (`--set fresh`); what the default graph does was chosen on prompts of
`--set chosen-on`, whose seed differs:

1. of the 50 features with the largest estimated effects, Pearson's correlation with exact ablation has a median of at
   least 0.95 over prompts;
2. ablating the 5 features with the largest positive effects lowers the quantity more than each of 20 sets of matched
   features (same layer, nearest in activation and firing rate) in at least 95% of prompts;
3. half the faithfulness (zero ablation, errors kept) is reached with at most a third of the features that ranking by
   activation needs (median over prompts). Of the graph its own features count alone, the largest share first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.graphs import (
    MATCHED,
    STRONGEST,
    TOP,
    activations,
    agreement,
    estimates,
    half,
    matched,
    median_ratio,
    median_size,
)
from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.lab.why import FACTORS, SEEDS, prompts
from experiments.sections import paragraph, table
from qwen_scope.circuits import Place, Quantity, Reading, WhyOptions, explain, read

GRAPH, METHODS = "the default graph", ("gradient", "relp", "ig", "joint")
TITLE = "Why this token: the default graph and every method by itself"


@dataclass(frozen=True)
class Sizes:
    """Prompts of each part, and on how many of them every method is measured too."""

    prompts: int = 10
    methods: int = 1


def of_graph(reading: Reading, places: Sequence[Place], activation: np.ndarray, seed: int) -> dict[str, Any]:
    """What the default graph of a prompt says, under the three criteria."""
    graph = explain(reading, WhyOptions(exact=0))
    at = {place: n for n, place in enumerate(places)}
    effect, share = np.zeros(len(places)), np.zeros(len(places))
    for i in graph.features:
        node = graph.nodes[i]
        n = at[Place(node.layer or 0, node.position, node.feature)]
        effect[n], share[n] = node.effect, node.share or 0.0
    out = {"agreement": agreement(reading, places, effect), "nodes": len(graph.features)}
    out |= {"beats": matched(reading, places, effect, activation, seed)["beats"]}
    order = np.argsort(-share, kind="stable")[: int((share > 0).sum())]
    by_size = np.argsort(-np.abs(share), kind="stable")[: int((share != 0).sum())]
    return {**out, "half": half(reading, places, order), "half_by_size": half(reading, places, by_size)}


def of_method(
    reading: Reading, places: Sequence[Place], activation: np.ndarray, seed: int, method: str
) -> dict[str, Any]:
    """The same of one method's ranking of all active features."""
    _, effect = estimates(reading, method)
    out: dict[str, Any] = {"agreement": agreement(reading, places, effect)}
    out |= {"beats": matched(reading, places, effect, activation, seed)["beats"]}
    order = np.argsort(-effect if method == "joint" else -np.abs(effect))
    return {**out, "half": half(reading, places, order)}


def of_prompt(ids: list[int], quantity: Quantity, seed: int, methods: Sequence[str]) -> dict[str, Any]:
    """Everything that is measured on one prompt."""
    reading = read(lab(), ids, quantity)
    places, _ = estimates(reading, "gradient")
    activation = activations(reading)
    out = {method: of_method(reading, places, activation, seed, method) for method in methods}
    out[GRAPH] = of_graph(reading, places, activation, seed)
    out["activation"] = half(reading, places, np.argsort(-activation))
    return out


def run(at: At[Sizes], factor: str, part: int) -> dict[str, Any]:
    """Some prompts of one factor."""
    seed = SEEDS[at.options["set"]] + 100 * part
    source = prompts(factor, seed + FACTORS.index(factor))
    asked = [METHODS if n < at.sizes.methods else () for n in range(at.sizes.prompts)]
    return {"prompts": [of_prompt(*next(source), seed=seed + n, methods=one) for n, one in enumerate(asked)]}


def measures(rows: Sequence[Any], name: str) -> tuple[Any, ...]:
    """Of the prompts on which something was measured: their number, correlations, beaten sets, sizes and ratio."""
    ones = [row for row in rows if name in row]
    pairs = [row[name]["agreement"] for row in ones if row[name]["agreement"] is not None]
    halves = [{"own": row[name]["half"], "activation": row["activation"]} for row in ones]
    pearson, spearman = (float(np.median([pair[n] for pair in pairs])) for n in (0, 1))
    beats = float(np.mean([row[name]["beats"] for row in ones]))
    sizes = [median_size(halves, side) for side in ("own", "activation")]
    return len(ones), pearson, spearman, beats, *sizes, median_ratio(halves, "own", "activation")


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(row["factor"], []).extend(row["prompts"])
    everything = [one for ones in groups.values() for one in ones]
    found = {(GRAPH, factor): measures(ones, GRAPH) for factor, ones in groups.items()}
    found[GRAPH, "all"] = whole = measures(everything, GRAPH)
    found |= {(method, "all"): measures(everything, method) for method in METHODS if method in everything[0]}
    cells = [(name, factor, n, pearson, spearman, f"{beats:.0%}", *rest)
             for (name, factor), (n, pearson, spearman, beats, *rest) in found.items()]  # fmt: skip
    how = f"""`python -m experiments.lab.why_graph --set {at.options["set"]} --write`: prompts and quantities of "Why
        this token: estimated effects", by other seeds. The default graph chooses at most {WhyOptions().nodes} features
        by what they add while those of all layers grow together, and tells their effects by gradient. Medians over
        prompts: correlation of estimated and exact effects of the {TOP} features with the largest estimates; the share
        of prompts in which ablating the {STRONGEST} strongest lowers the quantity more than each of {MATCHED} matched
        sets; the number of features with which half the faithfulness is reached (zero ablation, errors kept), by the
        graph's shares or the method's effects, and by activation; and the median ratio of the two."""
    met = [whole[1] >= 0.95, whole[3] >= 0.95, whole[-1] <= 1 / 3]
    names = ("Pearson of 0.95", "95% of prompts", "a third of the features")
    said = "; ".join(f"{name}: {'met' if one else 'not met'}" for name, one in zip(names, met, strict=True))
    by_size = median_ratio([{"own": one[GRAPH]["half_by_size"], "activation": one["activation"]} for one in everything],
                           "own", "activation")  # fmt: skip
    nodes = float(np.median([one[GRAPH]["nodes"] for one in everything]))
    said = f"""Criteria fixed before the run, of the default graph: {said}. It has {nodes:g} features (median); with its
        features in the order of the size of their share, those against the answer included, the ratio is
        {by_size:.2f}."""
    columns = ("ranked by", "factor", "prompts", "Pearson", "Spearman", "strongest beat matched", "half",
               "half by activation", "ratio")  # fmt: skip
    return "\n\n".join([paragraph(how), table(columns, cells), paragraph(said)])


experiment = Experiment(
    title=TITLE,
    varies={"factor": FACTORS, "part": (0, 1, 2, 3, 4)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"factor": ("language", "digit"), "part": (0,)},
    quick_sizes=Sizes(prompts=2, methods=1),
    options={"set": {"choices": tuple(SEEDS), "default": "fresh", "help": "which prompts; default: fresh"}},
)

if __name__ == "__main__":
    main(experiment)
