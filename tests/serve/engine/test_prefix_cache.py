"""The prefix cache: no wrong continuation in random conversations, and untouched blocks shared with everybody."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import served

from qwen_scope.serve import Ask, ServeSettings

TALKS, TURNS = 40, 3


@dataclass
class Talk:
    """A conversation: every turn's prompt is all that was said before and a few words more."""

    recipes: list[Ask | None]
    ids: list[int]
    turns: list[tuple[list[int], Ask | None, list[int]]] = field(default_factory=list)


@pytest.fixture(scope="module")
def llm() -> Any:
    """A cache of few blocks, so that they are evicted and found again."""
    return served.start(
        ServeSettings(sae=str(served.LAB / "sae"), layers=tuple(range(6)), feature_layers=(2, 4), rows=16),
        kv_cache_memory_bytes=4 * 2**20,
        max_num_batched_tokens=512,
    )


def test_no_continuation_is_wrong_in_random_conversations(llm: Any, known: dict[str, Any]) -> None:
    rng = random.Random(0)
    long = {tuple(case.ids) for case in known["long"]}
    starts = [list(ids) for ids in sorted(long)]
    asks: list[Ask | None] = [None, None, *(case.ask for case in known["long"] if case.ask is not None)]
    asks += [case.ask for case in known["cases"] if case.ask is not None and case.ask.phases is None][::11]
    talks = [Talk([rng.choice(asks)] * 2 + [rng.choice(asks)], list(rng.choice(starts))) for _ in range(TALKS)]
    found = 0
    for turn in range(TURNS):
        order = rng.sample(talks, len(talks))
        for part in (order[i : i + 8] for i in range(0, len(order), 8)):
            out = ask_all(llm, [talk.ids for talk in part], [talk.recipes[turn] for talk in part])
            found += sum(count for _, count in out)
            for talk, (said, _) in zip(part, out, strict=True):
                talk.turns.append((list(talk.ids), talk.recipes[turn], said))
                talk.ids += said + rng.choice(starts)[: rng.randint(3, 12)]
    assert found > 1000, "the conversations found hardly anything in the cache"
    every = [one for talk in talks for one in talk.turns]
    wrong = 0
    for part in (every[i : i + 8] for i in range(0, len(every), 8)):
        chosen = [
            params(ask, skip_reading_prefix_cache=True) for _, ask, _ in part
        ]  # from the start, whatever is cached
        out = served.answers(llm, [ids for ids, _, _ in part], chosen)
        assert not any(one.num_cached_tokens for one in out)
        wrong += sum(list(one.outputs[0].token_ids) != said for one, (_, _, said) in zip(out, part, strict=True))
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
