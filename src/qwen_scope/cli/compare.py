"""`qwen-scope compare`: which features tell two texts apart."""

from __future__ import annotations

from typing import Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.scope import ScopeOptions

from . import options, output
from .groups import grouped

SCOPE = ScopeOptions()
COLUMNS = ("layer", "feature", "rate_a", "rate_b", "difference")


@grouped
def compare(
    a: Annotated[str, typer.Argument(help="The first text; '-' reads standard input.")],
    b: Annotated[str, typer.Argument(help="The second text; '-' likewise.")],
    asked: ScopeOptions = SCOPE,
    layers: options.Layers = None,
    top: Annotated[int, typer.Option("--top", help="Features per layer.", min=1)] = 5,
    drop_first: Annotated[bool, typer.Option("--drop-first", help="Leave out the first token.")] = False,
    drop_common: Annotated[bool, typer.Option("--drop-common", help="Leave out tokens that occur in both.")] = False,
    drop_prefix: Annotated[bool, typer.Option("--drop-prefix", help="Leave out the common beginning.")] = False,
    chat: options.Chat = None,
    phase: options.Phase = None,
    as_json: options.Json = False,
) -> None:
    """Rank the features that tell two texts apart.

    By the difference of their activation rates, layer by layer.
    A feature's activation rate is the share of a text's tokens on which it is active.
    """
    from qwen_scope.report import Table
    from qwen_scope.scope import compare_seen
    from qwen_scope.text import summaries

    mode, phases = options.check_chat(chat), options.check_phases(phase)
    wanted = options.parse_layers(layers)
    if a == b == "-":
        raise InputError("standard input holds one text; write the other out")
    a, b = options.typed_or_piped(a), options.typed_or_piped(b)
    scope = options.open_asked(asked)
    seen = scope.features([a, b], wanted, chat=mode)
    found = compare_seen(
        seen, 1, n=top, drop_first=drop_first, drop_common=drop_common, drop_prefix=drop_prefix, phases=phases
    )
    left_out = {layer: {why: n for why, n in seen.tally(layer).items() if why != "padding"} for layer in seen.layers}
    if as_json:
        output.print_json({"a": a, "b": b, "left_out": left_out, "layers": found})
        return
    everything = Table.of("Activation rates", [c for some in found.values() for c in some], COLUMNS)
    told = {layer: [c for c in features if c.difference] for layer, features in found.items()}
    if not any(told.values()):
        layers_said = ", ".join(map(str, found))
        output.show("", COLUMNS, [], everything)
        output.console().print(f"No feature of layers {layers_said} is more active on one of the two texts.")
        return
    rows = [
        (layer if i == 0 else None, c.feature, f"{c.rate_a:.0%}", f"{c.rate_b:.0%}", f"{c.difference:+.0%}")
        for layer, features in told.items()
        for i, c in enumerate(features)
    ]
    columns = ("layer", "feature", "in the first", "in the second", "difference")
    title = "Activation rates of two texts: the share of tokens on which a feature is active"
    output.show(title, columns, rows, everything)
    for sentence in summaries(left_out):
        output.console().print(sentence)
