"""Find the features of a target group, and what they are on every other group: the alpha table."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float64

from qwen_scope.errors import InputError, NotFoundError, check_count, nearest
from qwen_scope.features import Pooled, attribute, group_scores, pool_texts
from qwen_scope.model import capture
from qwen_scope.report import Progress
from qwen_scope.scope import Scope
from qwen_scope.steer import script as written_in
from qwen_scope.text import by_length

from .codeswitch import switches
from .data import COMPLETIONS, PrepareRun
from .sources import labelled_texts, training_samples
from .table import AlphaTable, LayerTable

BATCH_TOKENS = 4096
OWN_TOKEN = 0.99
"""A token is the target's own if, with every group weighted alike, so much of its use is in the target's texts."""


def prepare_table(scope: Scope, run: PrepareRun, *, progress: Progress | None = None) -> AlphaTable:
    """Read the texts of all groups and make the alpha table of the target.

    Args:
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        as `prepare`, and whatever reading raises.
    """
    labelled = labelled_texts(run.source, run.reading, run.group_column)
    onsets = None
    if run.onsets is not None and run.script is not None:
        how = replace(COMPLETIONS, seed=run.reading.seed + 1)
        rows = training_samples(run.onsets, how, "prompt", run.group_column)
        onsets = switches(rows, scope.tokenizer, run.target, run.script)
    return prepare(
        scope, labelled, run.target, layers=run.layers, features=run.features, onsets=onsets, script=run.script,
        quantile=run.quantile, at_random=run.at_random, progress=progress,
    )  # fmt: skip


def prepare(
    scope: Scope,
    labelled: Sequence[tuple[str, str]],
    target: str,
    *,
    layers: Sequence[int] | None = None,
    features: int = 2,
    onsets: Sequence[Sequence[int]] | None = None,
    script: str | None = None,
    quantile: float | None = None,
    at_random: int | None = None,
    progress: Progress | None = None,
) -> AlphaTable:
    """The alpha table of a target group, from texts with the names of their groups.

    A feature's score is its mean activation on the target less the mean of the other groups' means; the first token of
    a text does not count (SASFT, arXiv 2507.14894, whose authors take the top two of each of the last two layers, from
    100 sentences per group). Alpha is a feature's mean *pre-activation* on a group.

    Two departures from the published way, each its own: `onsets` ranks the features by what makes the model *begin*
    with the target, not by what says that a text *is* of it; and `quantile` sets alpha where little of a group's own
    text lies above it. With the mean about half of it does, and pays.

    Args:
        labelled: pairs of group and text; at least two groups. Any labels will do: languages, styles, topics.
        target: the group whose features are wanted.
        layers: by default the last two that have an SAE.
        features: how many of each layer.
        onsets: token ids of texts in which the target begins where it should not, up to and with its first token
            (`switches` finds them by a script); a feature's score is then its effect on that token (`attribute`).
        script: the target's, such as `CJK`: the tokens of the table are then also those with a letter of it that no
            text here uses. A few texts hold a hundredth of a vocabulary's, and a penalty leaves the others free.
        quantile: alpha is this quantile of the pre-activations on a group, instead of their mean.
        at_random: a seed that draws features instead, among those that fire at all in these texts and are not
            among the chosen: the control.
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        InputError: fewer than two groups, a group without a token that counts, too few features, a quantile outside
            0 to 1, or an unknown script.
        NotFoundError: a target that no text has, or a layer without an SAE.
    """
    groups = checked(labelled, target, features, quantile)
    wanted = scope.check_layers(scope.layers[-2:] if layers is None else layers)
    report = progress or (lambda stage, share, text: None)
    texts = {group: [text for other, text in labelled if other == group] for group in groups}
    pooled: dict[str, dict[int, Pooled]] = {}
    for i, group in enumerate(groups):
        pooled[group] = pool_texts(scope, texts[group], wanted)
        report("scores", (i + 1) / len(groups), group)
    scores: Mapping[int, np.ndarray] = (
        {layer: contrast(pooled, target, layer) for layer in wanted}
        if onsets is None
        else {layer: effects.double().numpy() for layer, effects in attribute(scope, onsets, wanted).items()}
    )
    chosen = {layer: np.argsort(-scores[layer], kind="stable")[:features].tolist() for layer in wanted}
    if at_random is not None:
        chosen = {layer: drawn(pooled, layer, chosen[layer], at_random) for layer in wanted}
    alpha: dict[str, dict[int, Float64[np.ndarray, " features"]]] = {}
    for i, group in enumerate(groups):
        found = pre_acts(scope, texts[group], chosen)
        alpha[group] = {
            layer: pre.mean(0) if quantile is None else np.quantile(pre, quantile, axis=0)
            for layer, pre in found.items()
        }
        report("alpha", (i + 1) / len(groups), group)
    tables = []
    for layer, some in chosen.items():
        numbers = {group: tuple(map(float, alpha[group][layer])) for group in groups}
        ranked = tuple(map(float, scores[layer][some]))
        tables.append(LayerTable(layer, scope.saes[layer].identity, tuple(some), ranked, numbers))
    made = {
        "model": scope.name,
        "texts": dict(Counter(group for group, _ in labelled)),
        "features": "at random" if at_random is not None else "by score" if onsets is None else "by effect",
        "onsets": None if onsets is None else len(onsets),
        "alpha": "mean" if quantile is None else f"quantile {quantile:g}",
        "versions": versions(),
    }
    return AlphaTable(target, tuple(tables), own_tokens(scope, texts, target, script), made)


def checked(labelled: Sequence[tuple[str, str]], target: str, features: int, quantile: float | None) -> list[str]:
    """The groups in order of their names, or what is wrong with the request."""
    groups = sorted({group for group, _ in labelled})
    if target not in groups:
        raise NotFoundError(f"no text belongs to the target {target!r}; {nearest(target, groups) if groups else ''}")
    if len(groups) < 2:
        raise InputError(f"every text belongs to {target!r}; a score needs texts of other groups to compare with")
    check_count("features per layer", features)
    if quantile is not None and (isinstance(quantile, bool) or not 0 <= quantile <= 1):
        raise InputError(f"a quantile lies between 0 and 1, not at {quantile}")
    return groups


def contrast(pooled: Mapping[str, Mapping[int, Pooled]], target: str, layer: int) -> Float64[np.ndarray, " d_sae"]:
    """Per feature the mean activation on the target less the mean of the other groups' means."""
    here = {group: found[layer] for group, found in pooled.items()}
    for group, found in here.items():
        if not found.tokens.any():
            raise InputError(f"no text of {group!r} has a second token that counts; its means would be of nothing")
    return group_scores(here)[target]


def drawn(pooled: Mapping[str, Mapping[int, Pooled]], layer: int, best: Sequence[int], seed: int) -> list[int]:
    """As many other features of a layer, at random among those that fire in any of the texts."""
    firing = np.unique(np.concatenate([found[layer].firing() for found in pooled.values()]))
    pool = np.setdiff1d(firing, best)
    if len(pool) < len(best):
        raise InputError(f"only {len(pool)} other features of layer {layer} fire here; {len(best)} are wanted")
    return sorted(map(int, np.random.default_rng([seed, layer]).choice(pool, len(best), replace=False)))


def pre_acts(
    scope: Scope, texts: Sequence[str], features: Mapping[int, Sequence[int]]
) -> dict[int, Float64[np.ndarray, "tokens features"]]:
    """Per layer the pre-activations of some features at all tokens of texts that count."""
    tokens = scope.tokenize(texts, truncate=True)
    parts: dict[int, list[np.ndarray]] = {layer: [] for layer in features}
    placed = {layer: scope.counted[layer].reasons_of(tokens) == 0 for layer in features}
    for rows in by_length(tokens.lengths, BATCH_TOKENS):
        seq = max(tokens.lengths[i] for i in rows)
        ids, mask = tokens.input_ids[rows, :seq], tokens.attention_mask[rows, :seq]
        residuals = capture(scope.model, ids, [scope.hook_point(layer) for layer in features], mask)
        for point, h in residuals.items():
            at = placed[point.layer][rows, :seq].to(h.device)
            kept = h[at & ~scope.counted[point.layer].sinks(h, point)]
            pre = scope.saes[point.layer].pre_acts(kept, list(features[point.layer]))
            parts[point.layer].append(pre.double().cpu().numpy())
    return {layer: np.concatenate(found) for layer, found in parts.items()}


def own_tokens(
    scope: Scope, texts: Mapping[str, Sequence[str]], target: str, script: str | None = None
) -> tuple[int, ...]:
    """The tokens that are used almost only in the target's texts, every group weighted alike; and with its script those
    with a letter of it that no text uses."""
    shares = {}
    for group, some in texts.items():
        tokens = scope.tokenize(some, truncate=True)
        used = tokens.input_ids[tokens.attention_mask.bool()].numpy()
        shares[group] = np.bincount(used, minlength=len(scope.tokenizer)) / len(used)
    total = np.sum(list(shares.values()), axis=0)
    own = (total > 0) & (shares[target] >= OWN_TOKEN * total)
    if script is not None:
        words = scope.tokenizer.batch_decode([[token] for token in range(len(scope.tokenizer))])
        own |= (total == 0) & (written_in(script)(words) > 0)
    return tuple(np.flatnonzero(own).tolist())


def versions() -> dict[str, Any]:
    """Of Python and of the packages that decide a run."""
    names = ("qwen-scope", "torch", "transformers", "trl", "peft", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
