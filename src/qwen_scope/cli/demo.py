"""`qwen-scope demo`: a tour of the bundled lab."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import names, options, output

if TYPE_CHECKING:
    from qwen_scope.scope import Scope, TokenFeatures

TEXT = "Could you please tell me where the station is? Shut up, you fool!"
OTHERS = ("Wo ist der Bahnhof? Halt die Klappe, du Esel!", "请问车站在哪里？", "12 + 30 = 42\n7 + 8 = 15")
FACTORS = {
    "en": "English from the rest", "de": "German from the rest", "zh": "Chinese from the rest",
    "en/rude": "rude English from other English", "arithmetic": "sums from the rest",
}  # fmt: skip
REDUCED = {"max": "largest activation", "mean": "mean activation"}
PAIR = ("Where is the market? I am going to the market.", "Wo ist der Markt? Ich gehe zum Markt.")


def demo(
    text: Annotated[str, typer.Argument(help="A sentence to look at; '-' reads standard input.")] = TEXT,
    device: options.Device = None,
) -> None:
    """Tour the bundled lab; no download.

    Features of a sentence token by token, what single features fire on, and two texts compared.
    """
    from qwen_scope.sae import catalog
    from qwen_scope.scope import ScopeOptions

    text = options.typed_or_piped(text)
    with output.status("opening the bundled model and its SAEs"):
        scope = options.open_scope(ScopeOptions(device=device))
    metrics = json.loads((Path(catalog.find("lab").model).parent / "metrics.json").read_text(encoding="utf-8"))
    out = output.console()
    layer = scope.layers[2 * len(scope.layers) // 3]
    sae = scope.saes[layer]
    out.print(
        f"The lab: a {scope.n_layers}-layer Qwen3 with d_model {scope.d_model}, trained on a small corpus with known"
        f" factors, and one SAE per layer: {sae.d_sae} features, {sae.k} active per token.\n"
    )
    seen = scope.features([text, *OTHERS])
    show_tokens(seen, layer)
    show_features(out, seen, metrics["detectors"])
    show_comparison(scope, layer)
    out.print("Next, on your own words:", style="bold")
    for command in (
        'qwen-scope features "Guten Morgen, du Esel!" --layers 2,4',
        'qwen-scope compare "Please wait." "Wait, idiot!" --drop-common',
        "qwen-scope catalog      # the released SAEs; then: qwen-scope plan GROUP",
    ):
        out.print(f"  {command}")


def show_tokens(seen: TokenFeatures, layer: int) -> None:
    from qwen_scope.report import visible

    acts = seen.of(0, layer)
    rows, shown = [], list[int]()
    for i, token in enumerate(seen.tokens[0]):
        pairs = zip(acts.indices[i, :4].tolist(), acts.values[i, :4].tolist(), strict=True)
        rows.append((visible(token), "   ".join(f"{f}:{v:.2f}" for f, v in pairs if v > 0)))
        shown += [f for f, v in pairs if v > 0]
    title = f"1. Token by token, layer {layer}: the strongest features (feature:activation)"
    output.show(title, ("token", "features"), rows)
    output.show_names(layer, shown)


def show_features(out: output.Terminal, seen: TokenFeatures, detectors: list[dict[str, Any]]) -> None:
    """For some factors of the corpus, the one feature that detects it best, and what it says of each text."""
    from rich.text import Text

    from qwen_scope.report import shaded

    out.print("2. What single features tell, by their activation in a text", style="bold")
    best = {d["factor"]: d for d in detectors}
    for factor, name in FACTORS.items():
        d = best[factor]
        called = names.name(d["layer"], d["feature"])
        out.print(
            f"  Feature {d['feature']} of layer {d['layer']}{f', {called},' if called else ''} tells {name} where its"
            f" {REDUCED[d['reduction']]} exceeds {d['threshold']:.2f} (F1 {d['f1']:.2f} on held-out texts):"
        )
        columns = [seen.of(i, d["layer"]).select([d["feature"]])[:, 0] for i in range(len(seen.texts))]
        top = max(float(column.max()) for column in columns)
        for tokens, column in zip(seen.tokens, columns, strict=True):
            value = float(column.max() if d["reduction"] == "max" else column.mean())
            line = Text(f"    {'yes' if value > d['threshold'] else 'no':3}  {value:5.2f}  ")
            line.append(shaded(tokens, column.tolist(), top, brackets=not out.is_terminal))
            out.print(line, soft_wrap=True)
    out.print()


def show_comparison(scope: Scope, layer: int) -> None:
    found = scope.compare(*PAIR, [layer], n=5, drop_first=True)[layer]
    rows = [(c.feature, f"{c.rate_a:.0%}", f"{c.rate_b:.0%}", f"{c.difference:+.0%}") for c in found]
    title = f"3. Two texts compared, layer {layer}: {PAIR[0]!r} and {PAIR[1]!r}"
    output.show(title, ("feature", "active in the first", "in the second", "difference"), rows, layer=layer)
