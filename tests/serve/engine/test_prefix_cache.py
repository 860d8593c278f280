"""The prefix cache: no wrong continuation in random conversations, and untouched blocks shared with everybody."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import served
from cases import LONG

from qwen_scope.model import load_tokenizer
from qwen_scope.serve import Ask, PromptKinds, ServeSettings
from qwen_scope.text import tokenize

TALKS, TURNS = int(os.environ.get("QWEN_SCOPE_TALKS", "40")), 3
"""Of conversations, and of turns in each."""

WAVE = 40
"""Conversations that go on together: more would have evicted everything before they come again."""


@dataclass
class Turn:
    """One request and its answer."""

    ids: list[int]
    ask: Ask | None
    said: list[int]


@dataclass
class Talk:
    """A conversation: every turn's prompt is all that was said before and some words more.

    Attributes:
        recipes: of each turn.
        ids: all tokens so far, where it is a plain text.
        messages: where it is a chat, whose phases the recipes may name.
    """

    recipes: list[Ask | None]
    ids: list[int]
    messages: list[dict[str, str]] | None = None
    turns: list[Turn] = field(default_factory=list)

    def request(self, turn: int, tokenizer: Any) -> tuple[list[int], Ask | None]:
        """The prompt of a turn and what is asked."""
        ask = self.recipes[turn]
        if self.messages is None:
            return list(self.ids), ask
        tokens = tokenize(tokenizer, [self.messages], max_length=None, chat="default")
        kinds = PromptKinds.of(tokens.phases(0)[1].tolist(), "default", tokens.rendered[0].next_phase)
        return tokens.input_ids[0, : tokens.lengths[0]].tolist(), None if ask is None else replace(ask, phases=kinds)

    def answered(self, turn: Turn, more: list[int], tokenizer: Any) -> None:
        """Keep an answer, and say what comes next."""
        self.turns.append(turn)
        if self.messages is None:
            self.ids += turn.said + more
        else:
            said = tokenizer.decode(turn.said, skip_special_tokens=True)
            self.messages += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": tokenizer.decode(more)},
            ]


@pytest.fixture(scope="module")
def llm() -> Any:
    """A cache of few blocks, so that they are evicted and found again."""
    return served.start(
        ServeSettings(sae=str(served.LAB / "sae"), layers=tuple(range(6)), feature_layers=(2, 4), rows=16),
        kv_cache_memory_bytes=6 * 2**20,
        max_num_batched_tokens=512,
    )


@pytest.fixture
def evicted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every block that gives way to another."""
    from vllm.v1.core.block_pool import BlockPool  # pyright: ignore[reportMissingImports]

    found, evict = [], BlockPool._maybe_evict_cached_block

    def counted(self: Any, block: Any) -> bool:
        if gone := evict(self, block):
            found.append(block.block_id)
        return gone

    monkeypatch.setattr(BlockPool, "_maybe_evict_cached_block", counted)
    return found


def random_talks(known: dict[str, Any], rng: random.Random, starts: list[list[int]]) -> list[Talk]:
    """Two thirds plain texts, one third chats; a recipe may change between the second turn and the third."""
    plain: list[Ask | None] = [None, None, *(case.ask for case in known["long"] if case.ask is not None)]
    plain += [case.ask for case in known["cases"] if case.ask is not None and case.ask.phases is None][::11]
    by_phase = [case.ask for case in known["cases"] if case.ask is not None and case.ask.phases is not None]
    talks = []
    for i in range(TALKS):
        asks = [None, *by_phase, *by_phase, *plain[2:5]] if i % 3 == 2 else plain
        recipes = [rng.choice(asks)] * 2 + [rng.choice(asks)]
        messages = [{"role": "user", "content": rng.choice(LONG)}] if i % 3 == 2 else None
        talks.append(Talk(recipes, list(rng.choice(starts)), messages))
    return talks


def test_no_continuation_is_wrong_in_random_conversations(
    llm: Any, known: dict[str, Any], evicted: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    rng, tokenizer = random.Random(0), load_tokenizer(str(served.LAB / "model"))
    starts = [list(ids) for ids in sorted({tuple(case.ids) for case in known["long"]})]
    talks = random_talks(known, rng, starts)
    found = 0
    for wave in (talks[i : i + WAVE] for i in range(0, TALKS, WAVE)):
        for turn in range(TURNS):
            order = rng.sample(wave, len(wave))
            for part in (order[i : i + 8] for i in range(0, len(order), 8)):
                asked = [talk.request(turn, tokenizer) for talk in part]
                out = ask_all(llm, [ids for ids, _ in asked], [ask for _, ask in asked])
                found += sum(count for _, count in out)
                for talk, (ids, ask), (said, _) in zip(part, asked, out, strict=True):
                    talk.answered(Turn(ids, ask, said), rng.choice(starts)[: rng.randint(3, 12)], tokenizer)
    assert found > 50 * TALKS, "the conversations found hardly anything in the cache"
    assert len(evicted) > TALKS, "hardly a block gave way to another"
    every = [one for talk in talks for one in talk.turns]
    wrong = 0
    for part in (every[i : i + 8] for i in range(0, len(every), 8)):
        # from the start, whatever is cached
        chosen = [params(one.ask, skip_reading_prefix_cache=True) for one in part]
        out = served.answers(llm, [one.ids for one in part], chosen)
        assert not any(one.num_cached_tokens for one in out)
        wrong += sum(list(new.outputs[0].token_ids) != one.said for new, one in zip(out, part, strict=True))
    with capsys.disabled():
        print(
            f"{TALKS} conversations, {len(every)} turns, {wrong} wrong, {found} tokens cached, {len(evicted)} evicted"
        )
    assert wrong == 0, f"{wrong} of {len(every)}"


def test_blocks_that_nothing_touches_are_shared_with_everybody(llm: Any, known: dict[str, Any]) -> None:
    """A recipe for generated tokens leaves the prompt's blocks to others, and takes theirs."""
    plain = next(case for case in known["long"] if case.ask is None)
    later = ask_at(known, "add feature at generated")
    everywhere = ask_at(known, "add feature at all")
    blocks = len(plain.ids) // 32 * 32
    llm.reset_prefix_cache()
    ask_all(llm, [plain.ids], [None])
    assert shared(llm, plain.ids, later) == blocks
    assert shared(llm, plain.ids, everywhere) == 0
    assert shared(llm, plain.ids, everywhere) == blocks
    assert shared(llm, plain.ids, None) == blocks
    first_block_alone = ask_at(known, "add feature at 0,2-4,12-14")
    assert shared(llm, plain.ids, first_block_alone) == 0
    llm.reset_prefix_cache()
    assert shared(llm, plain.ids, later) == 0
    assert shared(llm, plain.ids, None) == blocks


def ask_at(known: dict[str, Any], name: str) -> Ask:
    return next(case.ask for case in known["cases"] if case.name == name)


def ask_all(llm: Any, prompts: Sequence[list[int]], asks: Sequence[Ask | None]) -> list[tuple[list[int], int]]:
    """What each request generates, and how many tokens of its prompt were found in the cache."""
    chosen = [params(ask) for ask in asks]
    out = served.answers(llm, list(prompts), chosen)
    return [(list(one.outputs[0].token_ids), one.num_cached_tokens or 0) for one in out]


def params(ask: Ask | None, **options: Any) -> Any:
    return served.params(ask, n=20, ignore_eos=True, **options)


def shared(llm: Any, ids: list[int], ask: Ask | None) -> int:
    """How many tokens of a prompt were found in the cache."""
    (out,) = served.answers(llm, [ids + [7] * 3], [served.params(ask, n=2)])
    return out.num_cached_tokens
