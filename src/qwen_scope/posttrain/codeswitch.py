"""How often a model's answers hold a script that they should not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.errors import InputError, NotFoundError, check_count
from qwen_scope.report import Progress
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import Decoding, generate, script

from .samples import Sample, as_text

SAMPLES, TEMPERATURE, TOP_P = 8, 1.0, 0.8
"""Of the report (arXiv 2605.11887) and of SASFT, who generate up to 2,048 tokens without a repetition penalty."""


@dataclass(frozen=True)
class CodeSwitch:
    """What was measured.

    Attributes:
        script: the script that should not occur.
        ratio: the share of answers that hold any letter of it, with an interval over prompts.
        answers: per prompt the answers.
        switched: per prompt and answer whether it holds the script.
    """

    script: str
    ratio: Interval
    answers: list[list[str]]
    switched: list[list[bool]]


def code_switch_ratio(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    name: str,
    *,
    samples: int = SAMPLES,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    max_new_tokens: int = 2048,
    seed: int = 0,
    progress: Progress | None = None,
) -> CodeSwitch:
    """The share of sampled answers in which any letter belongs to a Unicode script.

    Args:
        prompts: as the model reads them, up to where the answer begins; their answers should not hold the script.
        name: the script, such as `CJK`, `HANGUL`, `CYRILLIC` or `ARABIC`.
        samples: answers per prompt.
        seed: of the draws; the same prompts, seed and model give the same answers.

    Raises:
        InputError: fewer than two prompts, no sample, an unknown script, or a prompt too long for the context.
    """
    if len(prompts) < 2:
        raise InputError(f"a ratio needs at least two prompts, not {len(prompts)}")
    check_count("samples", samples)
    share = script(name)
    decoding = Decoding(max_new_tokens, True, temperature, top_p, top_k=0, repetition_penalty=1.0)
    answers: list[list[str]] = [[] for _ in prompts]
    for turn in range(samples):
        mine = replace(decoding, seed=seed * samples + turn)
        for row, found in zip(answers, generate(model, tokenizer, prompts, decoding=mine), strict=True):
            row.append(found.text)
        if progress is not None:
            progress("answers", (turn + 1) / samples, f"{turn + 1} of {samples}")
    switched = [[bool(value > 0) for value in share(row)] for row in answers]
    per_prompt = np.array([np.mean(row) for row in switched])
    return CodeSwitch(name, bootstrap(per_prompt, seed=seed), answers, switched)


def first_letter(text: str, name: str) -> int | None:
    """Where the first letter of a Unicode script stands in a text."""
    found = np.flatnonzero(script(name)(list(text)) > 0)
    return int(found[0]) if len(found) else None


def switches(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, target: str, name: str) -> list[list[int]]:
    """Where learnt texts switch into a script they should not hold: token ids up to the one with its first letter.

    Left out are samples of the target or without a group, and groups that write in the script themselves: most of
    their samples hold it. A prompt may hold the script: only what is learnt is searched.

    Args:
        target: the group whose script it is.
        name: the script, as in `code_switch_ratio`.

    Raises:
        NotFoundError: no sample switches.   InputError: an unknown script.
    """
    found: dict[str, list[list[int] | None]] = {}
    for sample in samples:
        if sample["group"] in (None, target):
            continue
        asked, said = as_text(sample, tokenizer)
        at, ids = first_letter(said, name), None
        if at is not None:
            read = tokenizer(asked)["input_ids"] if asked else []  # with its BOS, as it is read while training
            made = tokenizer(said, add_special_tokens=not asked, return_offsets_mapping=True)
            last = next(i for i, (start, end) in enumerate(made["offset_mapping"]) if start <= at < end)
            ids = [*read, *made["input_ids"][: last + 1]]
        found.setdefault(sample["group"], []).append(ids)
    rare = [some for some in found.values() if 2 * sum(ids is not None for ids in some) <= len(some)]
    out = [ids for some in rare for ids in some if ids is not None and len(ids) > 1]
    if not out:
        raise NotFoundError(f"no sample outside {target!r} switches to {name}: there is nothing to rank features by")
    return out
