"""Watches in a running engine, of which the cache is small and the steps short: chunks, preemptions and evictions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import served
import torch
from matrix import count_preemptions

from qwen_scope import load_scope
from qwen_scope.lab import documents
from qwen_scope.scope import Scope
from qwen_scope.serve import Ask, ServeSettings, Watch
from qwen_scope.steer import Decoding, Intervention, Where
from qwen_scope.text import Counted

NEW = 20
LAYERS = (4, 5)


@dataclass(eq=False)
class Seen:
    """A prompt, the model's answer, and all activations of both from the toolkit, `(tokens, d_sae)` by layer."""

    prompt: str
    ids: list[int]
    said: list[int]
    acts: dict[int, torch.Tensor]
    counts: dict[int, torch.Tensor]

    def raised(self, watch: Watch) -> tuple[int, int, int | None]:
        """Of the tokens that are computed: how many are asked, at how many the rule holds, where its alarm is."""
        tokens = len(self.ids) + len(self.said) - 1
        positions, lengths = torch.arange(tokens)[None], torch.tensor([[len(self.ids)]])
        on = watch.where.mask(positions, lengths)[0]
        if watch.counted != Counted.everything():
            on &= self.counts[4][:tokens]
        holds = torch.zeros(tokens, dtype=torch.bool)
        for layer, feature, threshold in watch.features:
            holds |= self.acts[layer][:tokens, feature] > threshold
        found = (on & holds).nonzero()[:, 0].tolist()
        return int(on.sum()), len(found), found[watch.times - 1] if len(found) >= watch.times else None


@pytest.fixture(scope="module")
def scope() -> Scope:
    return load_scope("lab", device="cpu")


@pytest.fixture(scope="module")
def seen(scope: Scope) -> list[Seen]:
    """Prompts whose answers are the same tokens when they are read as a text, as `scope.features` reads them."""
    begun = [one.text[:n].rsplit(" ", 1)[0] + " " for one in documents(seed=5, n=24) for n in (60, 200)]
    out = []
    for answer in scope.generate(begun, decoding=Decoding(max_new_tokens=NEW)):
        said = [one.token_id for one in answer.tokens]
        ids = scope.tokenizer(answer.prompt)["input_ids"]
        if len(said) < NEW or scope.tokenizer(answer.prompt + answer.text)["input_ids"] != ids + said:
            continue
        found = scope.features([answer.prompt + answer.text], LAYERS)
        acts = {layer: found.of(0, layer).to_dense() for layer in LAYERS}
        out.append(Seen(answer.prompt, ids, said, acts, {layer: found.counts(0, layer) for layer in LAYERS}))
    assert len(out) >= 12
    return out[:12]


@pytest.fixture(scope="module")
def preempted() -> list[str]:
    return count_preemptions()


@pytest.fixture(scope="module")
def llm(preempted: list[str]) -> Any:
    settings = ServeSettings(
        sae=str(served.LAB / "sae"), layers=tuple(range(6)), feature_layers=(4,), read_layers=LAYERS, rows=8
    )
    return served.start(settings, kv_cache_memory_bytes=2 * 2**20, max_num_batched_tokens=48, max_num_seqs=12)


def later(seen: Seen, layer: int, rng: random.Random, least: int = 0) -> tuple[int, int, float]:
    """A feature and a threshold that it exceeds first at a random generated token, halfway to what it was before."""
    while True:
        position = rng.randrange(len(seen.ids) + least, len(seen.ids) + len(seen.said) - 2)
        here = seen.acts[layer]
        gain = here[position] - here[:position].max(0).values
        good = (gain > 0.02).nonzero()[:, 0].tolist()
        if good:
            feature = rng.choice(good)
            return layer, feature, float(here[position, feature] - gain[feature] / 2)


def ask(watch: Watch, **rest: Any) -> Ask:
    return Ask(watch=(watch,), ticket=watch.name, **rest)


def run(llm: Any, prompts: list[Seen], asks: list[Ask | None], **options: Any) -> list[Any]:
    chosen = [served.params(one, n=NEW, **options) for one in asks]
    return [one.outputs[0] for one in served.answers(llm, [one.ids for one in prompts], chosen)]


def alarms(llm: Any, ticket: str) -> list[dict[str, Any]]:
    (found,) = llm.collective_rpc("qwen_scope_alarms", args=(ticket,))
    return [alarm for listed in found.values() for alarm in listed]


def test_alarms_are_where_scope_features_says(llm: Any, scope: Scope, seen: list[Seen], preempted: list[str]) -> None:
    """Random rules over chunks and preemptions: the same alarms, and as many tokens asked and firings counted."""
    rng = random.Random(0)
    prompts, watches = [], []
    for i in range(60):
        one = seen[i % len(seen)]
        strong = sorted(one.acts[4].max(0).values.topk(40).indices.tolist())
        features = [(4, rng.choice(strong), round(rng.uniform(0, 2), 3)), later(one, rng.choice(LAYERS), rng)]
        where = Where.parse(rng.choice(["generated", "all", "prompt", "generated,2-4", "3-30"]))
        counted = rng.choice([Counted.everything(), scope.counted[4]])
        fit: dict[str, Any] = {"counted": counted} if counted.first and features[1][0] == 4 else {}
        watches.append(Watch(f"w{i}", tuple(sorted(features)), where, times=rng.choice([1, 1, 2, 3]), **fit))
        prompts.append(one)
    known = [one.raised(watch) for one, watch in zip(prompts, watches, strict=True)]
    assert sum(position is not None for _, _, position in known) > 30
    before = len(preempted)
    out = run(llm, prompts, [ask(watch) for watch in watches])
    assert len(preempted) > before
    assert [list(one.token_ids) for one in out] == [one.said for one in prompts]
    (status,) = llm.collective_rpc("qwen_scope_status")
    for watch, (asked, held, position) in zip(watches, known, strict=True):
        found = alarms(llm, watch.name)
        assert [one["position"] for one in found] == ([] if position is None else [position]), watch
        rows = [row for row in status["watched"]["tokens"] if row[0] == watch.name]
        assert [sum(row[i] for row in rows) for i in (3, 4)] == [asked, held], watch
        assert {row[1] for row in rows} <= {"none"}
    raised = [row for row in status["watched"]["alarms"] if row[0].startswith("w")]
    assert len(raised) == sum(position is not None for _, _, position in known)


def test_a_stopped_answer_ends_with_the_token_that_raised_the_alarm(llm: Any, seen: list[Seen]) -> None:
    rng = random.Random(1)
    watches = [
        Watch(f"s{i}", (later(one, 4, rng, least=i % 3),), Where.parse("generated"), then="stop")
        for i, one in enumerate(seen)
    ]
    out = run(llm, seen, [ask(watch) for watch in watches])
    hot = run(llm, seen, [ask(watch) for watch in watches], top_p=0.5, min_p=0.1, repetition_penalty=1.0, logprobs=2)
    for one, watch, answer, other in zip(seen, watches, out, hot, strict=True):
        _, _, position = one.raised(watch)
        assert position is not None
        last = position - len(one.ids) + 1
        assert list(answer.token_ids)[:-1] == list(other.token_ids)[:-1] == one.said[:last]
        assert answer.finish_reason == other.finish_reason == "stop"
        assert {alarm["then"] for alarm in alarms(llm, watch.name)} == {"stop"}
    (empty,) = run(
        llm, seen[:1], [ask(Watch("p", ((4, int(seen[0].acts[4][2].argmax()), 0.0),), Where.parse("2"), then="stop"))]
    )
    assert len(empty.token_ids) == 1
    assert empty.finish_reason == "stop"


def test_a_switched_recipe_acts_from_the_next_token_on(llm: Any, scope: Scope, seen: list[Seen]) -> None:
    """Greedy tokens are those of `scope.generate` with the recipe at the positions from there."""
    rng = random.Random(2)
    direction = torch.randn(128, generator=torch.Generator().manual_seed(3)) * 4
    feature = int(seen[0].acts[4].sum(0).argmax())
    recipes = [
        [Intervention.add(layer=2, direction=direction, amount=1.0)],
        [Intervention.clamp(layer=4, feature=feature, amount=25.0)],
        [
            Intervention.ablate(layer=4, direction=direction),
            Intervention.add(layer=3, direction=-direction, amount=0.5),
        ],
    ]
    own = Intervention.scale(layer=4, feature=(feature + 1) % 2048, amount=1.0, where="generated")
    prompts, asks, known = [], [], []
    for i in range(3 * len(seen)):
        one, made = seen[i % len(seen)], recipes[i % 3]
        rule = later(one, 5 if i % 2 else 4, rng)
        where, beside = ("all", []) if i % 4 == 3 else ("generated", [own] if i % 5 == 0 else [])
        watch = Watch(f"t{i}", (rule,), Where.parse(where), then="switch", interventions=tuple(made))
        position = one.raised(watch)[2]
        assert position is not None
        there = Where(spans=((max(position + 1, len(one.ids)), len(one.ids) + NEW - 2),))
        turned = [Intervention.from_json({**each.to_json(), "where": str(there)}) for each in made]
        answer = scope.generate(one.prompt, [*beside, *turned], decoding=Decoding(max_new_tokens=NEW))
        prompts.append(one)
        asks.append(ask(watch, interventions=tuple(beside)))
        known.append([token.token_id for token in answer.tokens])
    out = run(llm, prompts, asks)
    assert [[t for t in one.token_ids if t not in (4091, 4092)] for one in out] == known
    assert sum(list(answer) != one.said for one, answer in zip(prompts, known, strict=True)) > len(known) // 2
    (status,) = llm.collective_rpc("qwen_scope_status")
    assert status["recipes"] <= len(asks)


def test_what_was_generated_under_a_switch_is_shared_with_nobody(llm: Any, seen: list[Seen]) -> None:
    """A next turn on top of a switched answer continues as if nothing were cached, and prompts are still shared."""
    rng = random.Random(3)
    direction = torch.randn(128, generator=torch.Generator().manual_seed(3)) * 4
    llm.reset_prefix_cache()
    one = max(seen, key=lambda each: len(each.ids))
    watch = Watch(
        "u", (later(one, 4, rng),), Where.parse("generated"), then="switch",
        interventions=(Intervention.add(layer=2, direction=direction, amount=1.0),),
    )  # fmt: skip
    (switched,) = served.answers(llm, [one.ids], [served.params(ask(watch), n=60, ignore_eos=True)])
    turn = one.ids + list(switched.outputs[0].token_ids) + one.ids[:3]
    (found,) = served.answers(llm, [turn], [served.params(n=NEW)])
    (fresh,) = served.answers(llm, [turn], [served.params(n=NEW, skip_reading_prefix_cache=True)])
    assert found.num_cached_tokens == len(one.ids) // 32 * 32 > 0
    assert list(found.outputs[0].token_ids) == list(fresh.outputs[0].token_ids)


def test_requests_beside_watched_ones_keep_their_log_probabilities_to_the_bit(llm: Any, seen: list[Seen]) -> None:
    rng = random.Random(4)
    watches = [Watch("v", (later(one, 4, rng),), Where.parse("generated"), then="mark") for one in seen]

    def beside(asks: list[Ask | None]) -> list[Any]:
        llm.reset_prefix_cache()
        out = run(llm, [*seen, *seen], [*[None] * len(seen), *asks], logprobs=3)
        return [[{t: p.logprob for t, p in step.items()} for step in one.logprobs] for one in out[: len(seen)]]

    plain = Ask(watch=(Watch("none", ((4, 0, 1e9),), Where.parse("generated")),), ticket="none")
    assert beside([ask(watch) for watch in watches]) == beside([plain] * len(seen)) == beside([None] * len(seen))
