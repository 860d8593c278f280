"""`qwen-scope features`: the strongest features of every token of a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import InputError
from qwen_scope.scope import ScopeOptions

from . import options, output
from .groups import grouped

if TYPE_CHECKING:
    from qwen_scope.report import Table
    from qwen_scope.scope import TokenFeatures
    from qwen_scope.text import Phase


SCOPE = ScopeOptions()
SHOWN = 200
"""Tokens of a table: those of a longer text are for a machine to read."""


@grouped
def features(
    text: Annotated[str, typer.Argument(help="The text; '-' reads standard input.")],
    asked: ScopeOptions = SCOPE,
    layers: options.ShownLayers = None,
    top: Annotated[int, typer.Option("--top", help="Features per token (or per answer).", min=1)] = 5,
    response: Annotated[
        str | None, typer.Option("--response", help="The model's answer to the text: ranks the answer's features.")
    ] = None,
    chat: options.Chat = None,
    phase: options.Phase = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut a text longer than the context.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show the strongest features of every token.

    Of a long text the first 200 tokens are shown, and the features that are strongest anywhere in it; --json has every
    token.

    With --response the text is the prompt and the features of the whole answer are ranked by strength: the way to see
    which feature drives a bad answer.
    """
    mode, phases = options.check_chat(chat), options.check_phases(phase)
    if phases is not None and response is not None:
        raise InputError("--phase tells the parts of one conversation apart; leave it out with --response")
    wanted = options.parse_layers(layers)
    text = options.typed_or_piped(text)
    scope = options.open_asked(asked)
    if wanted is None and response is None and not as_json:
        wanted = [scope.layers[len(scope.layers) // 2]]
    start = 0
    if response is not None:
        if not options.typed(response):
            raise InputError("the response is empty")
        prompt = scope.tokenize([text], chat=mode, truncate=truncate)
        start, text, mode = prompt.lengths[0], prompt.texts[0] + response, None
    seen = scope.features([text], wanted, chat=mode, truncate=truncate)
    if response is not None:
        print_ranking(seen, start, top, as_json)
        return
    told = None if phases is None else seen.phases(0)
    chosen = [i for i in range(len(seen.tokens[0])) if told is None or told[i] in (phases or ())]
    if not chosen:
        raise InputError(f"no token is of the phase {phase}; this text has {', '.join(dict.fromkeys(told or ()))}")
    if as_json:
        print_tokens_json(seen, chosen, told, top)
    else:
        print_tokens(seen, chosen, told, top)


def print_tokens(seen: TokenFeatures, chosen: list[int], phases: list[Phase] | None, top: int) -> None:
    """A table per layer: token, its phase if that was asked for, then its strongest features with their activations.

    Below it stands what the features are called that have a name.
    """
    from qwen_scope.report import visible

    first = chosen[:SHOWN]
    for layer in seen.layers:
        found, left_out = pairs(seen, layer, first, top), seen.left_out(0, layer)
        marked = any(left_out[i] for i in first)
        rows, shown_features = [], dict[int, None]()
        for i, here in zip(first, found, strict=True):
            shown_features |= dict.fromkeys(f for f, _ in here)
            told = [*([phases[i]] if phases else []), *([left_out[i]] if marked else [])]
            shown = "  ".join(f"{f}:{v:.3g}" for f, v in here)
            rows.append((i, visible(seen.tokens[0][i]), *told, shown))
        title = f"Layer {layer}: the strongest features of each token (feature:activation)"
        columns = ("#", "token", *(["phase"] if phases else []), *(["left out"] if marked else []), "features")
        output.show(title, columns, rows, token_table(seen, layer, chosen, phases, top))
        output.show_names(layer, shown_features)
        if len(first) < len(chosen):
            output.console().print(f"Shown are {len(first):,} of {len(chosen):,} tokens; --json has them all.")
            strongest(seen, layer, phases, chosen, top)
        say_left_out(seen, layer)


def token_table(seen: TokenFeatures, layer: int, chosen: list[int], phases: list[Phase] | None, top: int) -> Table:
    """The same with a row for each feature of each token, of all tokens."""
    from qwen_scope.report import Table

    left_out = seen.left_out(0, layer)
    rows = [
        (i, seen.tokens[0][i], *([phases[i]] if phases else []), left_out[i], layer, feature, value)
        for i, here in zip(chosen, pairs(seen, layer, chosen, top), strict=True)
        for feature, value in here
    ]
    columns = ("position", "token", *(["phase"] if phases else []), "left_out", "layer", "feature", "activation")
    return Table("Features of each token", columns, rows)


def pairs(seen: TokenFeatures, layer: int, chosen: list[int], top: int) -> Iterator[list[tuple[int, float]]]:
    """Per chosen token its strongest features with their activations, made when they are asked for."""
    acts = seen.of(0, layer)
    for i in chosen:
        both = zip(acts.indices[i, :top].tolist(), acts.values[i, :top].tolist(), strict=True)
        yield [(f, v) for f, v in both if v > 0]


def strongest(seen: TokenFeatures, layer: int, phases: list[Phase] | None, chosen: list[int], top: int) -> None:
    """The features that are strongest anywhere in a text that is too long to be shown."""
    of = None if phases is None else {phases[i] for i in chosen}
    rows = [
        (one.feature, one.maximum, one.position, f"{one.rate:.0%}") for one in seen.strongest(0, layer, top, phases=of)
    ]
    title = f"Layer {layer}: the strongest of the whole text"
    output.show(title, ("feature", "max", "at #", "tokens"), rows, layer=layer)


def print_tokens_json(seen: TokenFeatures, chosen: list[int], phases: list[Phase] | None, top: int) -> None:
    """One JSON document, written token by token."""
    found = {layer: pairs(seen, layer, chosen, top) for layer in seen.layers}
    left_out = {layer: seen.left_out(0, layer) for layer in seen.layers}

    def tokens() -> Iterator[dict[str, Any]]:
        for i in chosen:
            yield {
                "position": i,
                "id": int(seen.input_ids[0, i]),
                "token": seen.tokens[0][i],
                **({"phase": phases[i]} if phases else {}),
                "left_out": {layer: reasons[i] for layer, reasons in left_out.items() if reasons[i]},
                "layers": {
                    layer: [{"feature": f, "activation": v} for f, v in next(here)] for layer, here in found.items()
                },
            }

    output.print_json_list({"text": seen.texts[0]}, "tokens", tokens())


def print_ranking(seen: TokenFeatures, start: int, top: int, as_json: bool) -> None:
    """The features of the tokens from `start` on, ranked by their largest activation, layer by layer."""
    if start >= len(seen.tokens[0]):
        raise InputError("the response adds no token to the prompt")
    answer = slice(start, None)
    ranked = {layer: seen.strongest(0, layer, top, answer) for layer in seen.layers}
    if as_json:
        parts = {"prompt": slice(0, start), "response": answer}
        tallies = {layer: {name: seen.tally(layer, part) for name, part in parts.items()} for layer in seen.layers}
        output.print_json({"text": seen.texts[0], "response_starts_at": start, "left_out": tallies, "layers": ranked})
        return
    from qwen_scope.report import Table, marks_note, shaded

    for layer, found in ranked.items():
        acts = seen.of(0, layer)
        rows, left_out = [], seen.left_out(0, layer)[start:]
        for f in found:
            values = acts.select([f.feature])[start:, 0].tolist()
            where = shaded(seen.tokens[0][start:], values, f.maximum, left_out=left_out)
            rows.append((f.feature, f.maximum, f"{f.rate:.0%}", where))
        title = f"Layer {layer}: the features of the response, strongest first"
        data = Table.of("Features of the response", [{"layer": layer, **vars(one)} for one in found])
        columns = ("feature", "max", "tokens", "where it fires")
        output.show(title, columns, rows, data, layer=layer)
        say_left_out(seen, layer, "prompt", slice(0, start))
        say_left_out(seen, layer, "response", answer)
        if note := marks_note(left_out):
            output.console().print(note)


def say_left_out(seen: TokenFeatures, layer: int, part: str = "", tokens: slice | None = None) -> None:
    """A line on the tokens that do not count, if there are any.

    Args:
        part: what the line calls these tokens, such as `response`.
        tokens: only these; by default all.
    """
    from qwen_scope.text import summary

    counted = seen.tally(layer, tokens)
    if any(n for reason, n in counted.items() if reason not in ("counts", "padding")):
        output.console().print(f"{part}{', ' if part else ''}{summary(counted)}")
