"""`qwen-scope features`: the strongest features of every token of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.scope import ScopeOptions

from . import options, output
from .groups import grouped

if TYPE_CHECKING:
    from qwen_scope.scope import TokenFeatures
    from qwen_scope.text import Phase


SCOPE = ScopeOptions()


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
    """A table per layer: token, its phase if that was asked for, then its strongest features with their activations."""
    from qwen_scope.report import visible

    for layer in seen.layers:
        acts, left_out = seen.of(0, layer), seen.left_out(0, layer)
        marked = any(left_out[i] for i in chosen)
        rows = []
        for i in chosen:
            pairs = zip(acts.indices[i].tolist(), acts.values[i].tolist(), strict=True)
            shown = [f"{f}:{v:.3g}" for f, v in list(pairs)[:top] if v > 0]
            told = [*([phases[i]] if phases else []), *([left_out[i]] if marked else [])]
            rows.append((i, visible(seen.tokens[0][i]), *told, "  ".join(shown)))
        title = f"Layer {layer}: the strongest features of each token (feature:activation)"
        columns = ("#", "token", *(["phase"] if phases else []), *(["left out"] if marked else []), "features")
        output.show(title, columns, rows)
        say_left_out(seen, layer)


def print_tokens_json(seen: TokenFeatures, chosen: list[int], phases: list[Phase] | None, top: int) -> None:
    data = []
    for i in chosen:
        here, left_out = {}, {}
        for layer in seen.layers:
            if reason := seen.left_out(0, layer)[i]:
                left_out[layer] = reason
            acts = seen.of(0, layer)
            pairs = zip(acts.indices[i].tolist(), acts.values[i].tolist(), strict=True)
            here[layer] = [{"feature": f, "activation": v} for f, v in list(pairs)[:top] if v > 0]
        told = {"phase": phases[i]} if phases else {}
        data.append(
            {
                "position": i,
                "id": int(seen.input_ids[0, i]),
                "token": seen.tokens[0][i],
                **told,
                "left_out": left_out,
                "layers": here,
            }
        )
    output.print_json({"text": seen.texts[0], "tokens": data})


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
    from qwen_scope.report import marks_note, shaded

    for layer, found in ranked.items():
        acts = seen.of(0, layer)
        rows, left_out = [], seen.left_out(0, layer)[start:]
        for f in found:
            values = acts.select([f.feature])[start:, 0].tolist()
            where = shaded(seen.tokens[0][start:], values, f.maximum, left_out=left_out)
            rows.append((f.feature, f.maximum, f"{f.rate:.0%}", where))
        title = f"Layer {layer}: the features of the response, strongest first"
        output.show(title, ("feature", "max", "tokens", "where it fires"), rows)
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
