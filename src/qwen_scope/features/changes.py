"""From what somebody asks for to interventions and targets that fit a scope."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from qwen_scope.errors import InputError, QwenScopeWarning
from qwen_scope.model import capture
from qwen_scope.sae import parse_feature
from qwen_scope.scope import Scope
from qwen_scope.steer import Intervention, Row, Target, load_recipe, matches, script
from qwen_scope.text import Chat

from .options import ChangeOptions, RuleLike, TargetOptions
from .sweep import Continuations

MASSIVE = 4.0
"""Times the typical residual's length; sinks of real models have 5 to 170, other tokens up to 3."""


def check_change(options: ChangeOptions) -> Intervention | None:
    """The intervention that the options describe, at the output of its layer; None for a recipe. Needs no model.

    Raises:
        InputError: a feature and a recipe, neither, an amount that is missing or too much, or values that mean nothing
            together.
        NotFoundError: no such operation or unit.
    """
    if options.recipe is not None:
        if options.feature is not None:
            raise InputError("recipe= says what to change; leave feature= away")
        return None
    if options.feature is None:
        raise InputError("name what to change: feature= as LAYER/FEATURE, such as 5/678, or recipe=")
    layer, feature = parse_feature(options.feature)
    amount, unit = options.amount, options.unit
    if options.op == "ablate":
        if amount is not None:
            raise InputError("ablating a feature has no amount; to keep a share of it, use scale")
        amount, unit = 0.0, "raw"
    elif amount is None:
        raise InputError(f"{options.op} needs an amount=")
    elif options.op == "scale":
        unit = "raw"
    return Intervention.from_json(
        {
            "hook_point": f"layer{layer}",
            "op": options.op,
            "feature": feature,
            "amount": amount,
            "unit": unit,
            "where": options.where,
        }
    )


def interventions_of(scope: Scope, options: ChangeOptions) -> list[Intervention]:
    """What the options describe, where the SAE of its layer reads, or the interventions of the recipe they name.

    Raises:
        InputError, NotFoundError: as `check_change`; no such layer.
        FormatError, MismatchError: no recipe, or one for another model or other SAEs.
    """
    one = check_change(options)
    if one is None:
        assert options.recipe is not None
        return recipe_interventions(scope, options.recipe)
    return [one.at(scope.hook_point(one.layer))]


def recipe_interventions(scope: Scope, path: str | os.PathLike[str]) -> list[Intervention]:
    """The interventions of a recipe that fits the scope; raises as `load_recipe` and `Recipe.check`.

    A warning says where other tokens count now than did when its amounts were chosen.
    """
    found = load_recipe(path)
    found.check(scope.model, scope.saes)
    for sentence in found.differences(scope.counted):
        warnings.warn(sentence, QwenScopeWarning, stacklevel=2)
    return list(found.interventions)


def sinks_changed(
    scope: Scope, prompt: str, interventions: Sequence[Intervention], chat: Chat | None = None
) -> list[str]:
    """Sentences on tokens of a prompt with massive activations that interventions change too; none for most prompts.

    Raises:
        InputError: as `Scope.tokenize`.
    """
    tokens, out = scope.tokenize([prompt], chat=chat), []
    for point in dict.fromkeys(one.hook_point for one in interventions if one.where.prompt):
        norms = torch.linalg.vector_norm(capture(scope.model, tokens.input_ids, [point])[point][0].float(), dim=-1)
        ratio, at = (norms / scope.stats[point.layer].norm_median).max(0)
        if float(ratio) > MASSIVE:
            out.append(
                f"at {point} token {int(at)} is changed too, a sink: its residual is {float(ratio):.0f} times as long"
                " as the typical one, so a vector added there changes its direction little; to leave it alone, name"
                " positions or phases"
            )
    return out


def recipes_by_name(scope: Scope, paths: Sequence[str | os.PathLike[str]]) -> Mapping[str, list[Intervention]]:
    """The interventions of recipes by the names of their files, as `sweep_candidates` takes them.

    Raises:
        InputError: two of one name; else as `recipe_interventions`.
    """
    found = {Path(path).stem: recipe_interventions(scope, path) for path in paths}
    if len(found) < len(paths):
        raise InputError("two recipes have the same file name, which is what tells them apart")
    return found


def target_of(scope: Scope, options: TargetOptions) -> Target | Continuations:
    """The target that the options name.

    Raises:
        InputError: none, or several; a regular expression, script or feature that there is not.
        NotFoundError, MismatchError: a layer without SAE, or a rule of other SAEs.
    """
    named = [
        value
        for value in (options.regex, options.script, options.continuation, options.target_feature, options.rule)
        if value
    ]
    if len(named) != 1:
        raise InputError("name one target: regex=, script=, continuation=, target_feature= or rule=")
    if options.regex:
        return matches(options.regex)
    if options.script:
        return script(options.script)
    if options.continuation:
        return Continuations(options.continuation)
    if options.target_feature:
        return scope.feature_target(*parse_feature(options.target_feature))
    assert options.rule is not None
    return rule_target(scope, options.rule)


def text_target(scope: Scope, options: TargetOptions) -> Target:
    """As `target_of`, but only targets that read texts, which a verdict needs; raises InputError for continuations."""
    found = target_of(scope, options)
    if isinstance(found, Continuations):
        raise InputError("a verdict reads what is written: name regex=, script=, target_feature= or rule=")
    return found


def rule_target(scope: Scope, rule: RuleLike) -> Target:
    """1 where a classifier's rule calls the text positive, else 0, by the tokens that counted when it was fitted.

    Phases do not matter: what a model wrote is one text.

    Raises:
        NotFoundError: a layer without SAE.   MismatchError: a rule of other SAEs.
    """
    for layer in scope.check_layers(rule.layers):
        sae = scope.saes[layer]
        rule.check_sae(layer, sae.identity.fingerprint, sae.d_sae)

    counted = replace(rule.counted, phases=None)

    def positive(texts: list[str]) -> np.ndarray:
        values = np.zeros((len(texts), len(rule.features)))
        seen = scope.features([text or " " for text in texts], rule.layers, truncate=True, counted=counted)
        for i in range(len(texts)):
            for j, part in enumerate(rule.features):
                acts = seen.of(i, part.layer)[seen.counts(i, part.layer)].select([part.feature])
                values[i, j] = float(acts.max()) if acts.numel() else 0.0
        return rule.positive(values).astype(float)

    return positive


def scored_rows(scope: Scope, texts: Sequence[str]) -> list[Row]:
    """Texts as tokens whose perplexity counts from the second token on, as `sweep` and `validate` take a reference."""
    if not texts:
        return []
    tokens = scope.tokenize(texts, truncate=True)
    return [Row(tuple(ids[:n].tolist())) for ids, n in zip(tokens.input_ids, tokens.lengths, strict=True) if n > 1]
