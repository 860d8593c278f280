"""What the fine-tunings of the experiments have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qwen_scope import Scope
from qwen_scope.model import capture
from qwen_scope.posttrain import AlphaTable, Sample, first_letter

IGNORED, NO_GROUP = -100, -1
STEPS = 4  # tokens before a switch that `before_the_switch` looks at
QUIET: dict[str, Any] = {
    "max_length": 256,
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Settings of TRL's `SFTConfig`: the lab's model on the CPU, in float32, with nothing written and no bars."""


def tokenised(
    samples: Sequence[Sample],
    tokenizer: Any,
    groups: Sequence[str],
    target: str,
    script: str,
    *,
    coming: bool = False,
    apart: Collection[str] = (),
) -> list[dict[str, list[int]]]:
    """Prompts with completions as token ids with a group per token: the sample's up to a switch, none after it.

    What comes after the switch *is* text of the target, which SASFT leaves out.

    Args:
        groups: of the alpha table, whose indices the tokens carry.
        script: the target's; its first letter in a completion of another group is the switch.
        coming: for a term that acts on the token to come: the first token of the switch keeps its group.
        apart: groups that write in the target's script themselves; they have no group.
    """
    rows = []
    for sample in samples:
        asked = tokenizer(sample["prompt"])["input_ids"]
        text = sample["completion"]
        said = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        at = None if sample["group"] == target else first_letter(text, script)
        switch = len(text) if at is None else at
        number = NO_GROUP if sample["group"] in apart else groups.index(sample["group"])
        own = [number if end <= switch else NO_GROUP for _, end in said["offset_mapping"]]
        if coming and NO_GROUP in own:
            own[own.index(NO_GROUP)] = number
        ids = said["input_ids"]
        row = {"input_ids": asked + ids, "labels": [IGNORED] * len(asked) + ids}
        rows.append({**row, "groups": [NO_GROUP] * len(asked) + own})
    return rows


def before_the_switch(
    scope: Scope, chosen: AlphaTable, rows: Sequence[Mapping[str, Sequence[int]]]
) -> list[tuple[int, int, float, list[float], float, float]]:
    """Per feature how far it lies above its threshold before a switch, in the scope's model as it is.

    Args:
        rows: as `tokenised` makes them.

    Returns: of each feature layer, index and score; the mean over switching rows of what it lies above its threshold
        at each of the last tokens before the switch; and the share above it at the last of them, and over all response
        tokens of rows that do not switch.
    """
    points = {one.layer: scope.hook_point(one.layer) for one in chosen.layers}
    before: dict[int, list[np.ndarray]] = {one.layer: [] for one in chosen.layers}
    clean: dict[int, list[np.ndarray]] = {one.layer: [] for one in chosen.layers}
    for row in rows:
        groups = np.array(row["groups"])
        counted = np.flatnonzero((groups != NO_GROUP) & (groups != chosen.groups.index(chosen.target)))
        if len(counted) < STEPS:
            continue
        group, switched = chosen.groups[groups[counted[0]]], groups[-1] == NO_GROUP
        residuals = capture(scope.model, torch.tensor([row["input_ids"]]), list(points.values()))
        for one in chosen.layers:
            pre = scope.saes[one.layer].pre_acts(residuals[points[one.layer]][0], list(one.features)).numpy()
            above = pre[counted] - np.array(one.alpha[group])
            (before if switched else clean)[one.layer].append(above[-STEPS:] if switched else above > 0)
    out = []
    for one in chosen.layers:
        last, usual = np.stack(before[one.layer]), np.concatenate(clean[one.layer]).mean(0)
        for j, feature in enumerate(one.features):
            shares = (float((last[:, -1, j] > 0).mean()), float(usual[j]))
            out.append((one.layer, feature, one.scores[j], last[:, :, j].mean(0).tolist(), *shares))
    return out
