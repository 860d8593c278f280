"""What a sweep or a verdict may aim at, as options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError

from . import options

if TYPE_CHECKING:
    from qwen_scope.scope import Scope
    from qwen_scope.steer import Continuations, Target

Regex = Annotated[str | None, typer.Option("--regex", help="Target: the share of texts it is found in.")]
Script = Annotated[str | None, typer.Option("--script", help="Target: share of letters in a script, such as CYRILLIC.")]
OtherFeature = Annotated[
    str | None, typer.Option("--target-feature", help="Target: another feature's mean activation, as LAYER:FEATURE.")
]
Continuation = Annotated[
    list[str] | None, typer.Option("--continuation", help="Target: log-probability of this; may be repeated.")
]
Rule = Annotated[
    Path | None,
    typer.Option("--rule", help="Target: the share of texts that a classifier's rule (JSON) calls positive."),
]


def chosen_target(
    scope: Scope,
    regex: str | None = None,
    script: str | None = None,
    continuation: list[str] | None = None,
    feature: str | None = None,
    rule: Path | None = None,
) -> Target | Continuations:
    """The one target that was named.

    Raises:
        InputError: none, or several.
    """
    from qwen_scope.steer import Continuations, matches
    from qwen_scope.steer import script as script_share

    named = [value for value in (regex, script, continuation, feature, rule) if value]
    if len(named) != 1:
        raise InputError("name one target: --regex, --script, --continuation, --target-feature or --rule")
    if regex:
        return matches(regex)
    if script:
        return script_share(script)
    if continuation:
        return Continuations(tuple(map(options.typed, continuation)))
    return rule_target(scope, rule) if rule else feature_target(scope, str(feature))


def feature_target(scope: Scope, text: str) -> Target:
    """The mean activation of a feature over each text, read from `LAYER:FEATURE`."""
    match = re.fullmatch(r"(\d{1,6}):(\d{1,9})", text)
    if not match:
        raise InputError(f"--target-feature is LAYER:FEATURE, such as 4:1028, not {text!r}")
    return scope.feature_target(int(match[1]), int(match[2]))


def rule_target(scope: Scope, path: Path) -> Target:
    """1 where a rule that `classify fit` wrote calls the text positive, else 0.

    Raises:
        NotFoundError, FormatError: no such file, or not a rule.
        MismatchError: a rule of other SAEs.
    """
    import numpy as np

    from qwen_scope.analysis import Rule

    found = Rule.load(path)
    for layer in scope.check_layers(found.layers):
        sae = scope.saes[layer]
        found.check_sae(layer, sae.identity.fingerprint, sae.d_sae)

    def positive(texts: list[str]) -> np.ndarray:
        out = np.zeros(len(texts), bool)
        seen = scope.features([text or " " for text in texts], found.layers, truncate=True)
        for i in range(len(texts)):
            for part in found.features:
                out[i] |= float(seen.of(i, part.layer).select([part.feature]).max()) > part.threshold
        return out.astype(float)

    return positive
