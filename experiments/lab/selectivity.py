"""Remove a concept from the lab through its features, or project out a direction: side effects at equal effect.

    python -m experiments.lab.selectivity [--languages de,ru] [--write]

Concepts: the rude register of each language, against the other registers of that language. Features: the five of one
layer whose mean activation on training documents differs most, at the layer where the lab's card found the best single
detector. Unrelated: code, English prose and sums.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.sections import paragraph, table
from qwen_scope import Intervention, Scope
from qwen_scope.features import Examples, selectivity
from qwen_scope.lab import REGISTERS, documents
from qwen_scope.stats import Interval

FEATURES, CHARACTERS = 5, 160
LANGUAGES = ("de", "ru", "zh", "es", "ar")
TITLE = "Removing a concept: its features against a direction"


@dataclass(frozen=True)
class Sizes:
    """Texts of each side, half of which choose the features and the direction."""

    texts: int = 48


def talk(language: str, registers: tuple[str, ...], n: int) -> list[str]:
    """The beginnings of `n` texts of one language."""
    found = documents(seed=17, n=n, kinds=["talk"], languages=[language], registers=registers)
    return [document.text[:CHARACTERS] for document in found]


def strongest(scope: Scope, layer: int, positive: list[str], negative: list[str]) -> list[int]:
    """The features whose mean activation on `positive` most exceeds that on `negative`."""
    means = []
    for side in (positive, negative):
        seen = scope.features(side, [layer], truncate=True)
        means.append(seen.acts[layer][seen.mask].to_dense().mean(0))
    return (means[0] - means[1]).topk(FEATURES).indices.tolist()


def run(at: At[Sizes], language: str) -> dict[str, Any]:
    """Remove the rude register of one language both ways."""
    n, scope = at.sizes.texts, lab()
    metrics = json.loads((files("qwen_scope") / "assets" / "lab" / "metrics.json").read_text(encoding="utf-8"))
    layer = next(one["layer"] for one in metrics["detectors"] if one["factor"] == f"{language}/rude")
    unrelated = [one.text[:CHARACTERS] for one in documents(seed=18, n=n, kinds=["code", "prose", "arithmetic"])]
    rude = talk(language, ("rude",), 2 * n)
    other = talk(language, tuple(name for name in REGISTERS if name != "rude"), 2 * n)
    chosen = strongest(scope, layer, rude[n:], other[n:])
    steered = [Intervention.add(layer=layer, feature=feature, amount=1.0) for feature in chosen]
    found = selectivity(scope, steered, Examples(tuple(rude[:n]), tuple(other[:n]), tuple(unrelated)))
    return {"layer": layer, "ways": [found.features, found.direction], "comparable": found.comparable}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    cells = []
    for row in rows:
        for way in row["ways"]:
            measured = (Interval(**way[name]) for name in ("effect", "kl", "loss", "near_loss", "moved"))
            concept = f"{row['language']}/rude"
            cells.append((concept, row["layer"], way["name"], way["share"], *measured))
            cells[-1] += ("yes" if row["comparable"] else "no",)
    how = f"""`python -m experiments.lab.selectivity --write`: the rude register of a language is removed at every
        token of one layer, through the {FEATURES} features that distinguish it best from the other registers of the
        language (their activation times 1 - share), or by projecting out the component along the difference of means
        (times 1 - share). The stronger of the two is weakened until both raise the loss on rude texts equally. Side
        effects, per token in nats: KL and loss on unrelated text (code, prose, sums), loss on other registers of the
        same language, and the share of the activation of other features that the change itself moves on unrelated
        text. {at.sizes.texts // 2} rude texts, held out from the choice of features and from the direction; 95%
        intervals over texts."""
    why = """Whoever defends a model by removing something, or audits such a removal, needs to know what else was
        removed. Where `comparable` says no, one of the two had no effect that can be distinguished from zero, so its
        low cost means nothing."""
    columns = ("concept", "layer", "removed", "share", "effect", "KL", "loss", "loss, near", "moved", "comparable")
    return "\n\n".join([paragraph(how), table(columns, cells), paragraph(why)])


experiment = Experiment(
    title=TITLE,
    varies={"language": LANGUAGES},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"language": ("de", "zh")},
    quick_sizes=Sizes(texts=20),
)

if __name__ == "__main__":
    main(experiment)
