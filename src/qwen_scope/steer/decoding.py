"""`Decoding`: how tokens are chosen; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen_scope.errors import FormatError, InputError, check_count, check_number

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the most tokens generated per prompt.
        sample: draw from the distribution; by default the most probable token is taken (greedy).
        temperature, top_p, top_k, repetition_penalty: as in transformers; None takes the model's own generation
            config where `sample` is set, and no change of the distribution where it is not.
        seed: of the draws. Each row has its own stream, made from the seed and its place in the list of prompts, so a
            row's draws do not depend on the batch it runs in, nor on other threads.
        prefill_chunk: feed the prompt in pieces of this many tokens.

    Raises:
        InputError: a value out of range, or one that has no effect without `sample`.
    """

    max_new_tokens: int = 100
    sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        for name in ("temperature", "repetition_penalty", "top_p"):
            if (value := getattr(self, name)) is None:
                continue
            if check_number(name, value) <= 0:
                raise InputError(f"{name} is a number above 0, not {value}")
        if self.top_p is not None and self.top_p > 1:
            raise InputError(f"top_p is above 0 and at most 1, not {self.top_p}")
        if self.top_k is not None:
            check_count("top_k (0 is off)", self.top_k, 0)
        if self.prefill_chunk is not None:
            check_count("prefill_chunk", self.prefill_chunk)
        check_count("a seed", self.seed, 0)
        given = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        if given and not self.sample:
            raise InputError(f"{given[0]} has no effect on greedy decoding; set sample=True with it")

    def filled(self, model: nn.Module) -> Decoding:
        """The same with every None replaced: by the model's generation config, else by what changes nothing.

        Raises:
            FormatError: the config has something that is no number.
        """
        config = getattr(model, "generation_config", None) if self.sample else None
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
        changes = {}
        for name, default in neutral.items():
            if getattr(self, name) is None:
                found = getattr(config, name, None)
                if found is not None:
                    check_number(f"{name} of the model's generation config", found, kind=FormatError)
                changes[name] = type(default)(found) if found is not None else default
        # `given` without `sample` is refused above, so neutral values are set only where they are inert
        return replace(self, **changes) if self.sample else replace(self, repetition_penalty=self.repetition_penalty)
