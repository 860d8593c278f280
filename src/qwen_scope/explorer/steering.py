"""What the Steer tab and the HTTP API ask of the steering room: fields in, interventions and continuations out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from threading import Event
from typing import Any

import torch

from qwen_scope.errors import InputError, brief, check_number, nearest
from qwen_scope.features import Continuations, Sweep, SweepOptions, sweep
from qwen_scope.files import Fields, text_lines
from qwen_scope.lab import neutral_prompts
from qwen_scope.report import Progress
from qwen_scope.steer import (
    Decoding,
    Generation,
    Intervention,
    Recipe,
    Target,
    Where,
    generate,
    load_recipe,
    matches,
    script,
    stream,
)

from .access.limits import whole_number
from .app_state import AppState
from .stages import stage

CANDIDATES = 10
SWEEP_PROMPTS = 8
WHERE = 1000
"""Characters of a list of positions."""

VALUE = 1000
"""Characters of what a sweep looks for."""

FIELDS = ("layer", "feature", "op", "amount", "unit", "where")
DECODING = ("max_new_tokens", "sample", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
ROW = ("layer", "feature", "op", "amount", "unit", "where")
TARGETS = ("feature", "regex", "script", "text")


def intervention(fields: Mapping[str, Any]) -> Intervention:
    """The intervention that the fields describe: layer, feature, op, amount, unit, where.

    Raises:
        InputError, FormatError: a field is missing, or they mean nothing together.
    """
    fields = Fields(fields, "an intervention", (), ROW).data
    op = fields.get("op", "add")
    if unknown := sorted(map(str, set(fields) - set(FIELDS))):
        raise InputError(f"an intervention has no key {brief(unknown[0])}; {nearest(unknown[0][:60], FIELDS)}")
    layer, feature = whole_number(fields.get("layer"), "layer"), whole_number(fields.get("feature"), "feature")
    what = f"give the amount of feature {feature} as a number; it"
    amount = 0.0 if op == "ablate" else check_number(what, fields.get("amount"))
    unit = "raw" if op in ("scale", "ablate") else fields.get("unit", "resid_norm")
    if layer < 0:
        raise InputError(f"layers count from 0; there is no layer {layer}")
    return Intervention.from_json(
        {
            "hook_point": f"layer{layer}",
            "op": op,
            "feature": feature,
            "amount": amount,
            "unit": unit,
            "where": places(fields),
        }
    )


def places(fields: Mapping[str, Any]) -> str:
    """The positions in the fields of an intervention, a text of moderate length."""
    where = fields.get("where") or "all"
    if not isinstance(where, str) or len(where) > WHERE:
        raise InputError(f"positions are a text of up to {WHERE} characters, such as 0,2,5-8, not {brief(where)}")
    return where


def interventions(state: AppState, rows: Sequence[Mapping[str, Any]]) -> list[Intervention]:
    """The interventions of all rows, each checked against its SAE."""
    made = [intervention(row) for row in state.limits.check_rows(rows)]
    for one in made:
        stage(f"loading the SAE of layer {one.layer}")
        state.check_feature(one.layer, int(one.feature or 0))
    return [one.at(state.scope.hook_point(one.layer)) for one in made]


def preview(
    state: AppState, prompt: str, chat: str, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[bool], list[Where]]:
    """The prompt's tokens, which of them any intervention touches, and where each acts.

    Raises:
        InputError: positions that can't be read.
    """
    where = [Where.parse(places(row)) for row in state.limits.check_rows(rows)]
    tokens = state.scope.tokenize([state.check_text(prompt, "prompt")], chat=state.chat(chat))
    n = tokens.lengths[0]
    positions, lengths = torch.arange(n)[None], torch.tensor([[n]])
    touched = torch.zeros(1, n, dtype=torch.bool)
    phases = torch.from_numpy(tokens.phases(0)[1])[None] if any(one.by_phase for one in where) else None
    for one in where:
        touched |= one.mask(positions, lengths, phases)
    return tokens.strings[0], touched[0].tolist(), where


def checked_decoding(fields: object) -> dict[str, Any]:
    """The fields of a decoding that a caller of the API gives; raises InputError for another kind or an unknown key."""
    if fields is None:
        return {}
    if not isinstance(fields, Mapping):
        raise InputError(f"decoding is an object with keys such as max_new_tokens, not {brief(fields)}")
    if unknown := sorted(map(str, set(fields) - set(DECODING))):
        raise InputError(f"decoding has no key {brief(unknown[0])}; {nearest(unknown[0][:60], DECODING)}")
    if not isinstance(fields.get("sample", False), bool):
        raise InputError(f"sample is true or false, not {brief(fields['sample'])}")
    return dict(fields)


def decoding(state: AppState, fields: Mapping[str, Any]) -> Decoding:
    """How tokens are chosen, from fields; an empty one is the model's own.

    Raises:
        InputError: a value out of range, or more tokens than this page generates.
    """
    new = whole_number(fields.get("max_new_tokens", 60), "number of new tokens")
    if new > state.limits.new_tokens:
        raise InputError(f"this page generates up to {state.limits.new_tokens} tokens at a time, not {new}")
    sample = bool(fields.get("sample", False))
    chosen = {
        name: fields[name]
        for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        if fields.get(name) is not None and (sample or name == "repetition_penalty")
    }
    for name in chosen:
        check_number(name, chosen[name])
    if "top_k" in chosen:
        chosen["top_k"] = whole_number(chosen["top_k"], "top-k")
    return Decoding(new, sample, seed=whole_number(fields.get("seed") or 0, "seed"), **chosen)


def continued(
    state: AppState, prompt: str, chat: str, chosen: Sequence[Intervention], how: Decoding, on_text: Any = None
) -> Generation:
    """One continuation with probabilities and candidates."""
    scope = state.scope
    (made,) = generate(
        scope.model, scope.tokenizer, [state.check_text(prompt, "prompt")], chosen, saes=scope.saes, stats=scope.stats,
        decoding=how, chat=state.chat(chat), candidates=CANDIDATES, on_text=on_text,
    )  # fmt: skip
    return made


def both(
    state: AppState, prompt: str, chat: str, chosen: Sequence[Intervention], how: Decoding, stop: Event
) -> Iterator[tuple[str, str, Generation | None, Generation | None]]:
    """The unsteered and the steered continuation as they grow, side by side; finished ones at the end.

    The unsteered one is remembered while prompt and decoding stay the same. Where `stop` is set, both end.
    """
    measure(state, chosen)
    stage("reading the prompt, then writing")
    key = (prompt, chat, how)
    done: dict[str, Generation] = {}
    if (known := state.unsteered.get(key)) is not None:
        done["plain"] = known

    def side(name: str, those: Sequence[Intervention]) -> Iterator[str]:
        def run(on_text: Callable[[int, str], None]) -> list[Generation]:
            done[name] = continued(state, prompt, chat, those, how, on_text)
            return [done[name]]

        return (piece for _, piece in stream(run))

    steered = side("steered", chosen)
    plain: Iterator[str] = iter(()) if known is not None else side("plain", ())
    texts = [known.text if known is not None else "", ""]
    try:
        for pieces in zip_longest(plain, steered, fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            yield texts[0], texts[1], None, None
            if stop.is_set():
                return
    finally:
        for growing in (plain, steered):
            if hasattr(growing, "close"):
                growing.close()  # pyright: ignore[reportAttributeAccessIssue]
    state.unsteered.put(key, done["plain"])
    yield done["plain"].text, done["steered"].text, done["plain"], done["steered"]


def measure(state: AppState, chosen: Sequence[Intervention]) -> None:
    """Measure what the units of interventions stand for, which the first one at a layer waits for."""
    for layer in sorted({one.layer for one in chosen if one.unit != "raw"}):
        stage(f"measuring typical residuals of layer {layer}, which is done once")
        state.scope.stats[layer]


def sweep_target(state: AppState, kind: str, value: str, first: Intervention) -> Target | Continuations:
    """What a sweep measures.

    Raises:
        InputError: an unknown kind, or a value it can't use.
    """
    if kind == "feature":
        return state.scope.feature_target(first.layer, int(first.feature or 0))
    if kind not in TARGETS:
        raise InputError(f"a sweep aims at one of {', '.join(TARGETS)}, not {brief(kind)}")
    if not isinstance(value, str) or not value.strip():
        raise InputError("say what the continuation should be like: fill in the field beside the aim of the sweep")
    if len(value) > VALUE:
        raise InputError(f"what to look for has {len(value):,} characters; give up to {VALUE:,}")
    if kind == "regex":
        return matches(value, seconds=state.limits.pattern_seconds)
    return script(value) if kind == "script" else Continuations((value,))


def sweep_prompts(state: AppState, prompt: str, more: str) -> list[str]:
    """The prompts of a sweep: those given, one a line, else the one prompt and prefixes without a language."""
    lines = text_lines(more)
    if not lines:
        lines = [prompt, *(one.text for one in neutral_prompts(0, SWEEP_PROMPTS - 1))]
    if len(lines) < 2:
        raise InputError("a sweep needs at least two prompts, one a line")
    return state.limits.check_texts(lines, "prompt", state.limits.sweep_prompts)


def dosed(chosen: list[Intervention]) -> tuple[list[Intervention], bool]:
    """What a sweep multiplies, and whether its doses are lengths: a single `add` is made one typical residual long.

    Several keep their proportions, and a dose is then a factor for all their amounts.
    """
    if not chosen:
        raise InputError("a sweep needs at least one intervention")
    if len(chosen) == 1 and chosen[0].op == "add":
        return [replace(chosen[0], amount=1.0, unit="resid_norm")], True
    return chosen, False


def swept(
    state: AppState, prompts: list[str], chat: str, chosen: list[Intervention], target: Target | Continuations,
    how: Decoding, progress: Progress,
) -> Sweep:  # fmt: skip
    """Dose and response of the interventions, each counted in its own amount.

    Raises:
        InputError: more prompts and tokens than one visitor may keep the model busy with, or as `sweep` does.
    """
    if (tokens := len(prompts) * how.max_new_tokens) > state.limits.sweep_tokens:
        raise InputError(
            f"{len(prompts)} prompts of {how.max_new_tokens} new tokens are {tokens:,} at every amount and this page"
            f" generates up to {state.limits.sweep_tokens:,}; give fewer prompts or a smaller max_new_tokens"
        )
    options = SweepOptions(refine=1)
    return sweep(state.scope, prompts, chosen, target, options, decoding=how, chat=state.chat(chat), progress=progress)


def recipe_text(state: AppState, name: str, chosen: list[Intervention]) -> str:
    """A recipe as the text of a `.json` file."""
    scope, name = state.scope, name.strip() or "recipe"
    made = Recipe.of(name, scope.model, chosen, scope.saes, provenance="the explorer", counted=scope.counted)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.json"
        made.save(path)
        return path.read_text(encoding="utf-8")


def rows_of_recipe(state: AppState, path: str) -> tuple[str, list[dict[str, Any]], list[str]]:
    """The name and the fields of an uploaded recipe that fits the scope, and sentences on where other tokens count.

    Raises:
        FormatError, MismatchError, InputError: it is none, is for another model, or changes plain directions.
    """
    found = load_recipe(path, state.limits.recipe_bytes)
    state.limits.check_rows([{} for _ in found.interventions])
    found.check(state.scope.model, state.scope.saes)
    if any(one.feature is None for one in found.interventions):
        raise InputError(f"the recipe {brief(found.name)} changes plain directions, which this page does not show")
    return found.name, rows_of(found.interventions), found.differences(state.scope.counted)


def rows_of(changes: Sequence[Intervention]) -> list[dict[str, Any]]:
    """Interventions as the fields that describe them."""
    keys = ("op", "feature", "amount", "unit")
    return [
        {"layer": one.layer, "where": str(one.where), **{key: getattr(one, key) for key in keys}} for one in changes
    ]
