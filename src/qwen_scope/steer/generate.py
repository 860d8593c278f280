"""Generation under interventions, through transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.errors import FormatError, InputError, check_count
from qwen_scope.model import context_length, input_device, packed_head
from qwen_scope.report import HasFrames, Table, element, html_tokens, join, styled
from qwen_scope.text import Chat, Message, Tokens, token_text, tokenize

from .decoding import Decoding
from .detokenize import Pieces, shown
from .finite import NotFinite, explained
from .intervention import Intervention
from .phases import PromptPhases
from .processors import Watched, processors
from .steering import SAEsByLayer, StatsByLayer, resolve, steering

# Tokens of one batch, padding and what is to be generated included.
BATCH_TOKENS = 8192

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Candidate:
    """A token the model might have chosen, and its probability."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token.

    Attributes:
        token_id: which.
        text: what it shows; a character split over several tokens shows at the first, so the texts join to the whole.
        probability: what the model (steered, if it was) gave it, before temperature, top-k, top-p and penalty; None
            where no probabilities were asked for.
        candidates: the most probable tokens under the same distribution, in descending order.
    """

    token_id: int
    text: str
    probability: float | None = None
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, repr=False)
class Generation(HasFrames):
    """One continuation.

    Attributes:
        prompt: the prompt as the model got it, chat template included.
        text: the continuation, without the token that ended it.
        tokens: the same as tokens.
        finished: whether the model ended it; else it ran into `max_new_tokens`.
        prompt_tokens: what each token of the prompt shows.
    """

    prompt: str
    text: str
    tokens: tuple[GeneratedToken, ...]
    finished: bool
    prompt_tokens: tuple[str, ...]

    def __repr__(self) -> str:
        shown = self.text if len(self.text) <= 60 else f"{self.text[:59]}…"
        return f"Generation({shown!r}, {len(self.tokens)} tokens)"

    def sheet(self) -> Table:
        """A row per token of the continuation."""
        rows = [(i, one.token_id, one.text, one.probability) for i, one in enumerate(self.tokens)]
        return Table(self.text, ("position", "token_id", "text", "probability"), rows)

    def _repr_html_(self) -> str:
        """The prompt, and the continuation with each token as strong as its probability, where those were asked for."""
        none = [0.0] * len(self.prompt_tokens)
        values = [*none, *(token.probability or 0.0 for token in self.tokens)]
        texts = [*self.prompt_tokens, *(token.text for token in self.tokens)]
        known = any(token.probability is not None for token in self.tokens)
        note = "A background is as strong as the token's probability." if known else None
        start = element("p", f"{len(self.prompt_tokens)} tokens of the prompt, then the continuation. ", note)
        return styled(join(start, html_tokens(texts, values, 1.0)))


@dataclass(frozen=True)
class Sides:
    """The same prompt with and without the interventions."""

    steered: Generation
    unsteered: Generation


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    interventions: Sequence[Intervention] = (),
    *,
    saes: SAEsByLayer | None = None,
    stats: StatsByLayer | None = None,
    decoding: Decoding | None = None,
    chat: Chat | None = None,
    candidates: int | None = None,
    on_text: OnText | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Generation]:
    """Continue every prompt (a text, or messages with `chat`) under the interventions; with none, unsteered.

    An `add` at all tokens is the rule of the official demo at its defaults: `h + strength * W_dec[:, feature]` at
    every prompt position and at every generated token.

    Args:
        saes, stats: the SAE and the statistics of a layer, asked for only where an intervention needs them.
        decoding: by default greedy, 100 tokens.
        chat: render each prompt with the chat template, a text as a user's message.
        candidates: keep each token's probability and this number of most probable tokens; None keeps neither.
        on_text: called with the number of a prompt and the next piece of its continuation while it grows.
        batch_tokens: how many tokens run together.

    Raises:
        InputError: no prompt, an empty one, one that does not fit the context with what is to be generated, a position
            past the end, a phase that no token can have or that the chat template does not mark, whatever `steering`
            refuses, or a model that gives NaN or infinity.
        NotFoundError, MismatchError: as in `steering`.
    """
    decoding = (decoding or Decoding()).filled(model)
    if candidates is not None:
        check_count("candidates", candidates, 0)
    interventions = resolve(model, interventions, saes, stats)
    tokens = tokenize(tokenizer, prompts, max_length=None, chat=chat, padding_side="left")
    check_lengths(tokens.lengths, decoding.max_new_tokens, context_length(model))
    check_reach(interventions, tokens.lengths, decoding.max_new_tokens)
    phases = phases_for(interventions, tokenizer, tokens, chat)
    config = generation_config(model, tokenizer, decoding)
    out: dict[int, Generation] = {}
    run: Any = model  # its `generate` comes from a mixin that the type does not show
    for rows in batches(tokens.lengths, decoding.max_new_tokens, batch_tokens):
        pieces = [Pieces(tokenizer) for _ in rows]
        growing = None if phases is None else phases.growing(rows, decoding.max_new_tokens)
        tell = None if on_text is None else _teller(rows, pieces, _eos(config), on_text)
        told = [one for one in (tell, growing and growing.feed) if one is not None]
        chain, choose = processors(decoding, rows, candidates=candidates, on_step=told)
        seq = max(tokens.lengths[i] for i in rows)
        place = input_device(model)
        lengths = [tokens.lengths[i] for i in rows]
        try:
            steered = steering(model, interventions, saes, stats, prompt_lengths=lengths, phases=growing)
            with packed_head(model), steered:
                run.generate(
                    tokens.input_ids[rows, -seq:].to(place),
                    attention_mask=tokens.attention_mask[rows, -seq:].to(place),
                    generation_config=config,
                    logits_processor=chain,
                )
        except NotFinite as found:
            here, length = found.row, lengths[found.row]
            raise explained(
                model,
                found.ids[seq - length :],
                interventions,
                saes,
                stats,
                prompt_length=length,
                phases=growing and growing.row(here),
            ) from None
        if on_text is not None:
            for i, row in enumerate(rows):
                if rest := pieces[i].rest():
                    on_text(row, rest)
        out |= dict(zip(rows, _results(tokenizer, tokens, rows, choose.seen, _eos(config), decoding), strict=True))
    return [out[i] for i in range(len(prompts))]


def side_by_side(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    interventions: Sequence[Intervention],
    *,
    saes: SAEsByLayer | None = None,
    stats: StatsByLayer | None = None,
    decoding: Decoding | None = None,
    chat: Chat | None = None,
    candidates: int = 10,
) -> list[Sides]:
    """Every prompt steered and unsteered, with equal draws, probabilities and candidates; raises as `generate`."""
    steered, plain = (
        generate(
            model,
            tokenizer,
            prompts,
            chosen,
            saes=saes,
            stats=stats,
            decoding=decoding,
            chat=chat,
            candidates=candidates,
        )
        for chosen in (interventions, ())
    )
    return [Sides(a, b) for a, b in zip(steered, plain, strict=True)]


def phases_for(
    interventions: Sequence[Intervention], tokenizer: PreTrainedTokenizerBase, tokens: Tokens, chat: Chat | None
) -> PromptPhases | None:
    """The phases of these prompts where an intervention asks for them, else None.

    Raises:
        InputError: a phase that no token can have, or that the chat template does not mark.
    """
    asked = [one.where for one in interventions if one.where.by_phase]
    if not asked:
        return None
    phases = PromptPhases(tokenizer, tokens, chat)
    for where in asked:
        phases.check(where)
    return phases


def check_lengths(lengths: Sequence[int], new: int, context: int | None) -> None:
    """Refuse prompts that leave no room for what is to be generated."""
    if context is not None and max(lengths) + new > context:
        raise InputError(
            f"a prompt of {max(lengths)} tokens and {new} to generate exceed the context of {context}; shorten the"
            " prompt or generate fewer"
        )


def check_reach(interventions: Sequence[Intervention], lengths: Sequence[int], new: int) -> None:
    """Refuse listed positions that never come: the last token generated is not read again."""
    last = min(lengths) + new - 2
    for one in interventions:
        if one.where.reach > last:
            raise InputError(
                f"position {one.where.reach} is past the end: a prompt of {min(lengths)} tokens and {new} to generate"
                f" have positions 0 to {last} that can be steered"
            )


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> GenerationConfig:
    """What `generate` is told: no sampling, because our logits processors choose the tokens.

    Raises:
        FormatError: the model's own config ends a text at something that is no token.
    """
    own = model.generation_config
    eos = next((ids for ids in (own and own.eos_token_id, tokenizer.eos_token_id) if ids is not None), None)
    for one in eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]:
        check_count("eos_token_id of the model's generation config", one, -1, kind=FormatError)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        prefill_chunk_size=decoding.prefill_chunk,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def batches(lengths: Sequence[int], new: int, budget: int) -> list[list[int]]:
    """Prompts of like length together, within the budget of tokens; a single one always fits."""
    out: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if out and (lengths[i] + new) * (len(out[-1]) + 1) <= budget:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def _eos(config: GenerationConfig) -> set[int]:
    ids = config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _teller(rows: list[int], pieces: list[Pieces], eos: set[int], on_text: OnText) -> Callable[[Tensor], None]:
    finished = [False] * len(rows)

    def tell(chosen: Tensor) -> None:
        for i, token_id in enumerate(chosen.tolist()):
            finished[i] |= token_id in eos
            if not finished[i] and (piece := pieces[i].push(token_id)):
                on_text(rows[i], piece)

    return tell


def _results(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    rows: list[int],
    seen: Watched,
    eos: set[int],
    decoding: Decoding,
) -> list[Generation]:
    """What was watched, as plain values; steps after a row's end are dropped."""
    chosen = torch.stack(seen.chosen, 1).tolist()
    probability = torch.stack(seen.log_probability, 1).exp().tolist() if seen.log_probability else None
    tops = [(ids.tolist(), values.exp().tolist()) for ids, values in seen.top]
    out = []
    for i, row in enumerate(rows):
        ids = chosen[i][: decoding.max_new_tokens]
        end = next((step for step, token_id in enumerate(ids) if token_id in eos), None)
        ids = ids[:end]
        texts = shown(tokenizer, ids)
        made = []
        for step, (token_id, text) in enumerate(zip(ids, texts, strict=True)):
            best: list[Candidate] = []
            if tops:
                pairs = zip(tops[step][0][i], tops[step][1][i], strict=True)
                best = [Candidate(other, token_text(tokenizer, other), p) for other, p in pairs]
            made.append(GeneratedToken(token_id, text, probability[i][step] if probability else None, tuple(best)))
        out.append(
            Generation(tokens.texts[row], "".join(texts), tuple(made), end is not None, tuple(tokens.strings[row]))
        )
    return out
