"""Small faithful sets of features on the lab, and whether graphs of paraphrases agree.

    python -m experiments.lab.why_sets [--set chosen-on] [--write]

The prompts, quantities and the count of features up to half the faithfulness are those of `experiments.lab.why`, so its
figures can stand beside these. `faithfulness` runs the model with a set of features kept at every layer at once, while
that experiment ranked features by what the gradient at the whole prompt says of each alone. Here they are ranked by
what they add while the features of all layers grow from none to all together (method `joint`), the largest first, with
its sign.

Paraphrases are questions of the lab in the same language and register about the same topic in other words, with the
logit of the token that the model finds likeliest after the first of them. Unrelated prompts are those of other groups.

Criteria, fixed before the run that is reported (`--set reported`); the ranking was chosen on prompts of
`--set chosen-on`, whose seed differs:

1. half the faithfulness (zero ablation, errors kept) is reached with at most a third of the features that ranking by
   activation needs (median over prompts);
2. the 20 strongest features of paraphrases overlap more than those of unrelated prompts, by a 95% bootstrap interval
   over groups of the difference that lies above 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.graphs import activations, estimates, half, median_ratio, median_size
from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.lab.why import FACTORS, SEEDS, ids_of, likeliest, prompts
from experiments.sections import paragraph, table
from qwen_scope.circuits import Graph, Quantity, WhyOptions, explain, overlap, read
from qwen_scope.lab import chat_prompts

TITLE = "Why this token: small faithful sets, and paraphrases"
STRONGEST = 20
PARAPHRASES = "paraphrases"


@dataclass(frozen=True)
class Sizes:
    """Prompts of each part, and groups of paraphrases of each part."""

    prompts: int = 10
    groups: int = 6


def sets_of(factor: str, seed: int, n: int) -> list[dict[str, int | None]]:
    """By ranking, how many features half the faithfulness takes on each prompt."""
    source, out = prompts(factor, seed + FACTORS.index(factor)), []
    for _ in range(n):
        ids, quantity = next(source)
        reading = read(lab(), ids, quantity)
        places, alone = estimates(reading, "gradient")
        _, together = estimates(reading, "joint")
        orders = {"joint": np.argsort(-together), "effect": np.argsort(-np.abs(alone))}
        orders["activation"] = np.argsort(-activations(reading))
        out.append({name: half(reading, places, order) for name, order in orders.items()})
    return out


def groups_of(seed: int, n: int) -> list[list[str]]:
    """Pairs of questions that ask the same in other words, each pair about something else."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for one in chat_prompts(seed=seed, n=60 * n):
        texts = found.setdefault((one.language, one.register, *sorted(one.factors.items())), [])
        if one.text not in texts:
            texts.append(one.text)
    return [texts[:2] for texts in found.values() if len(texts) > 1][:n]


def overlaps(seed: int, n: int) -> dict[str, list[float]]:
    """Of each group, how much its graphs share, and how much they share with those of other groups."""
    graphs: list[list[Graph]] = []
    for texts in groups_of(seed, n):
        ids = [ids_of(text) for text in texts]
        quantity = Quantity.logit(likeliest(ids[0]))
        options = WhyOptions(nodes=3 * STRONGEST, exact=0)
        graphs.append([explain(read(lab(), one, quantity), options) for one in ids])
    within = [overlap(*group, n=STRONGEST) for group in graphs]
    between = [
        float(np.mean([overlap(one, other, STRONGEST) for k, rest in enumerate(graphs) if k != n
                       for other in rest for one in group]))
        for n, group in enumerate(graphs)
    ]  # fmt: skip
    return {"within": within, "between": between}


def run(at: At[Sizes], factor: str, part: int) -> dict[str, Any]:
    """Some prompts of one factor, or some groups of paraphrases."""
    seed = SEEDS[at.options["set"]] + 100 * part
    if factor == PARAPHRASES:
        return overlaps(seed, at.sizes.groups)
    return {"half": sets_of(factor, seed, at.sizes.prompts)}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    groups: dict[str, list[Any]] = {}
    for row in rows:
        for name in (row["factor"], "all") if "half" in row else ():
            groups.setdefault(name, []).extend(row["half"])
    cells, ratio = [], float("nan")
    for factor in [*(name for name in groups if name != "all"), *(["all"] if groups else [])]:
        ones = groups[factor]
        ratio = median_ratio(ones, "joint", "activation")
        sizes = [median_size(ones, name) for name in ("joint", "effect", "activation")]
        cells.append((factor, len(ones), *sizes, ratio, median_ratio(ones, "effect", "activation")))
    within = np.array([x for row in rows for x in row.get("within", ())])
    between = np.array([x for row in rows for x in row.get("between", ())])
    draws = np.random.default_rng(0).integers(0, max(1, len(within)), (2000, len(within)))
    low, high = np.quantile((within - between)[draws].mean(1), [0.025, 0.975])
    how = f"""`python -m experiments.lab.why_sets --set {at.options["set"]} --write`: prompts and quantities of
        "Why this token: estimated effects". The number of features with which half the faithfulness is reached (zero
        ablation, errors kept, medians over prompts): ranked by what they add while those of all layers grow together
        (method joint, chosen on other prompts), by the size of their effect alone (method gradient, the ranking of that
        section) and by activation; and the median ratios of the first and of the second to the third."""
    columns = ("factor", "prompts", "half by joint", "by effect", "by activation", "ratio, joint", "ratio, effect")
    said = f"""Of {len(within)} pairs of paraphrases the {STRONGEST} strongest features share {within.mean():.2f}
        (Jaccard, at whatever tokens), of unrelated prompts {between.mean():.2f}: a difference of
        {(within - between).mean():.2f} [{low:.2f}, {high:.2f}]."""
    met = ("met" if ratio <= 1 / 3 else "not met", "met" if low > 0 else "not met")
    verdict = f"Criteria fixed before the run: a third of the features: {met[0]}; paraphrases agree more: {met[1]}."
    return "\n\n".join([paragraph(how), table(columns, cells), paragraph(said), paragraph(verdict)])


experiment = Experiment(
    title=TITLE,
    varies={"factor": (*FACTORS, PARAPHRASES), "part": (0, 1, 2, 3, 4)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"factor": ("digit", PARAPHRASES), "part": (0,)},
    quick_sizes=Sizes(prompts=2, groups=3),
    options={"set": {"choices": tuple(SEEDS), "default": "reported", "help": "which prompts; default: reported"}},
)

if __name__ == "__main__":
    main(experiment)
