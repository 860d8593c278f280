"""How often a model's answers hold a script that they should not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import Decoding, generate, script

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
    report: Callable[[float], None] | None = None,
) -> CodeSwitch:
    """The share of sampled answers in which any letter belongs to a Unicode script.

    Args:
        prompts: as the model reads them, up to where the answer begins; their answers should not hold the script.
        name: the script, such as `CJK`, `HANGUL`, `CYRILLIC` or `ARABIC`.
        samples: answers per prompt.
        seed: of the draws; the same prompts, seed and model give the same answers.

    Raises:
        InputError: fewer than two prompts, an unknown script, or a prompt too long for the context.
    """
    if len(prompts) < 2:
        raise InputError(f"a ratio needs at least two prompts, not {len(prompts)}")
    share = script(name)
    decoding = Decoding(max_new_tokens, True, temperature, top_p, top_k=0, repetition_penalty=1.0)
    answers: list[list[str]] = [[] for _ in prompts]
    for turn in range(samples):
        mine = replace(decoding, seed=seed * samples + turn)
        for row, found in zip(answers, generate(model, tokenizer, prompts, decoding=mine), strict=True):
            row.append(found.text)
        if report is not None:
            report((turn + 1) / samples)
    switched = [[bool(value > 0) for value in share(row)] for row in answers]
    per_prompt = np.array([np.mean(row) for row in switched])
    return CodeSwitch(name, bootstrap(per_prompt, seed=seed), answers, switched)
