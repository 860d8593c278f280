"""Take a concept out of the lab through its features, or project a direction out: what goes along, at equal effect.

    python bench/steer_selectivity.py [--write]

Concepts: the rude register of each language, against the other registers of that language. Features: the five of one
layer whose mean activation on training documents differs most, at the layer where the lab's card found the best single
detector. Unrelated: code, English prose and sums.
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files

import torch
from sections import paragraph, table, write_section

from qwen_scope import Intervention, Scope, load_scope
from qwen_scope.features import Examples, selectivity
from qwen_scope.lab import REGISTERS, documents

N, FEATURES, CHARACTERS = 48, 5, 160
LANGUAGES = ("de", "ru", "zh", "es", "ar")
TITLE = "Removing a concept: its features against a direction"


def talk(language: str, registers: tuple[str, ...], n: int) -> list[str]:
    """The beginnings of so many texts of one language."""
    found = documents(seed=17, n=n, kinds=["talk"], languages=[language], registers=registers)
    return [document.text[:CHARACTERS] for document in found]


def strongest(scope: Scope, layer: int, positive: list[str], negative: list[str]) -> list[int]:
    """The features whose mean activation on the one exceeds that on the other by most."""
    means = []
    for side in (positive, negative):
        seen = scope.features(side, [layer], truncate=True)
        means.append(seen.acts[layer][seen.mask].to_dense().mean(0))
    return (means[0] - means[1]).topk(FEATURES).indices.tolist()


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    scope = load_scope("lab", device="cpu")
    metrics = json.loads((files("qwen_scope") / "assets" / "lab" / "metrics.json").read_text(encoding="utf-8"))
    layers = {one["factor"]: one["layer"] for one in metrics["detectors"]}
    unrelated = [one.text[:CHARACTERS] for one in documents(seed=18, n=N, kinds=["code", "prose", "arithmetic"])]
    rows = []
    for language in LANGUAGES:
        concept = f"{language}/rude"
        rude = talk(language, ("rude",), 2 * N)
        other = talk(language, tuple(name for name in REGISTERS if name != "rude"), 2 * N)
        layer = layers[concept]
        chosen = strongest(scope, layer, rude[N:], other[N:])
        knob = [Intervention.add(layer=layer, feature=feature, amount=1.0) for feature in chosen]
        found = selectivity(scope, knob, Examples(tuple(rude[:N]), tuple(other[:N]), tuple(unrelated)))
        for way in (found.features, found.direction):
            cells = (concept, layer, way.name, way.share, way.effect, way.kl, way.loss, way.near_loss, way.moved)
            rows.append((*cells, "yes" if found.comparable else "no"))
        print(json.dumps({"concept": concept, **found.to_json()}, ensure_ascii=False), flush=True)
    how = f"""
        `bench/steer_selectivity.py --write`: the rude register of a language is taken out at every token of one layer,
        through the {FEATURES} features that tell it best from the other registers of the language (their activation
        times 1 - share), or by removing the component along the difference of means (times 1 - share). The stronger
        way is weakened until both raise the loss on rude texts alike. Beside it the collateral, per token in nats: KL
        and loss on unrelated text (code, prose, sums), loss on other registers of the same language, and the share of
        the activation of other features that the change itself moves on unrelated text. {N // 2} rude texts, held out
        from the choice of features and from the direction; 95% intervals over texts."""
    why = """
        Why it is here: whoever defends a model by removing something, or audits such a removal, needs to know what
        went along with it. Where `comparable` says no, one way had no effect that can be told from zero, and its low
        cost says nothing."""
    columns = ("concept", "layer", "removed", "share", "effect", "KL", "loss", "loss, near", "moved", "comparable")
    body = "\n\n".join([paragraph(how), table(columns, rows), paragraph(why)])
    if "--write" in arguments:
        write_section(TITLE, body)
    print(body)


if __name__ == "__main__":
    main(sys.argv[1:])
