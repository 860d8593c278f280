"""The phase of every token of a batch while it is steered: those of the prompts, and those that are generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.text import PHASES, Chat, GenerationPhases, Phase, Tokens

from .where import Where

TEXT = PHASES.index("text")


class PromptPhases:
    """The phases of the tokens of prompts, from the chat template, and of the tokens that follow them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, chat: Chat | None) -> None:
        """Work them out.

        Args:
            tokens: the prompts.
            chat: the mode that they were rendered in.

        Raises:
            InputError: the chat template gives no markers to tell the phases by.
        """
        self._tokenizer = tokenizer
        self._chat: Chat | None = chat
        self._known = [tokens.phases(i)[1].tolist() for i in range(len(tokens))]
        self._first: list[Phase] = [one.next_phase for one in tokens.rendered]

    def check(self, where: Where) -> None:
        """Refuse phases that no token of these prompts or after them can have.

        Raises:
            InputError: a phase of conversations in plain texts, `text` in conversations, or a phase that the chat
                template does not mark.
        """
        told = self._following(0).phases
        for phase in dict.fromkeys((*where.prompt_phases, *where.generated_phases)):
            if self._chat is None and phase != "text":
                raise InputError(
                    f"a plain text has no token of the phase {phase}; render the prompt with the chat template:"
                    " chat='default', on the command line --chat default"
                )
            if self._chat is not None and phase == "text":
                raise InputError("a conversation has no token of the phase text; name one of its own, such as answer")
            needs_marker = phase == "thinking" or (phase == "tool_call" and phase in where.generated_phases)
            if needs_marker and phase not in told:
                name = self._tokenizer.name_or_path or type(self._tokenizer).__name__
                raise InputError(
                    f"the chat template of {name} has no markers that tell {phase} from the rest of an answer; what it"
                    f" marks in generated text is {', '.join(told)}"
                )

    def followed(self, prompt: int, ids: Sequence[int]) -> tuple[int, ...]:
        """The phases of a prompt and of the tokens generated after it, as indices into `PHASES`."""
        return (*self._known[prompt], *self._following(prompt).follow(ids).tolist())

    def growing(self, prompts: Sequence[int], new: int) -> RowPhases:
        """The phases of a batch of these prompts, each of which grows by up to `new` tokens."""
        return RowPhases([self._known[i] for i in prompts], [self._following(i) for i in prompts], new)

    def _following(self, prompt: int) -> GenerationPhases:
        return GenerationPhases(self._tokenizer, self._chat, self._first[prompt])


class RowPhases:
    """The phases of the rows of a batch, by position; grows with every generated token."""

    def __init__(
        self, known: Sequence[Sequence[int]], following: Sequence[GenerationPhases] = (), new: int = 0
    ) -> None:
        """Start with what is known.

        Args:
            known: per row the phases of its tokens, padding not counted.
            following: per row what tells the phases of the tokens to come.
            new: the most tokens to come.
        """
        self._following = list(following)
        self._lengths = [len(row) for row in known]
        self._table = torch.full((len(known), max(self._lengths) + new), TEXT, dtype=torch.int8)
        for i, row in enumerate(known):
            self._table[i, : len(row)] = torch.as_tensor(np.asarray(row, np.int8))

    def feed(self, chosen: Int[Tensor, " rows"]) -> None:
        """The next token of every row."""
        for i, token in enumerate(chosen.tolist()):
            if self._lengths[i] < self._table.shape[1]:
                self._table[i, self._lengths[i]] = PHASES.index(self._following[i].feed(token))
                self._lengths[i] += 1

    def at(self, positions: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """The phases of the tokens at these positions, on their device.

        Raises:
            InputError: another number of rows.
        """
        if len(positions) != len(self._table):
            raise InputError(f"a batch of {len(positions)} rows, but the phases of {len(self._table)} are given")
        places = positions.cpu().clamp(0, self._table.shape[1] - 1)
        return self._table.gather(1, places).to(positions.device)

    def row(self, i: int) -> RowPhases:
        """One row of the batch alone."""
        return RowPhases([self._table[i, : self._lengths[i]].tolist()])
