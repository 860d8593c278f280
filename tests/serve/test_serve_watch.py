"""Watches without vLLM: their JSON, their admission, and what a worker decides in random chunks and preemptions."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_scope.analysis import Rule, RuleFeature
from qwen_scope.errors import InputError, QwenScopeError
from qwen_scope.model import load_tokenizer
from qwen_scope.sae import load_sae
from qwen_scope.scope import load_scope, model_source
from qwen_scope.serve import (
    Admission,
    Ask,
    ModelFacts,
    PromptKinds,
    ServeSettings,
    Shape,
    Step,
    Watch,
    WorkerState,
    read_watches,
)
from qwen_scope.serve.cache import BlockPlaces
from qwen_scope.steer import Intervention, Recipe, Where, signature
from qwen_scope.text import PHASES, Counted

WIDTH, END = 128, 9
ADD = Intervention.add(layer=2, direction=[1.0] * WIDTH, amount=0.5)
BODY = {"name": "loops", "features": {"4/678": 1.5, "5/12": 0.0}, "then": "stop", "times": 2}


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return ModelFacts(6, WIDTH, torch.float32, 512, signature(load_scope("lab").model))


@pytest.fixture
def admission(facts: ModelFacts, tmp_path: Path) -> Admission:
    (tmp_path / "recipes").mkdir()
    Recipe.of("calm", load_scope("lab").model, [ADD]).save(tmp_path / "recipes" / "calm.json")
    settings = ServeSettings(
        sae="lab", layers=(2,), feature_layers=(4,), read_layers=(4, 5), recipes=str(tmp_path / "recipes"), rows=4
    )
    return Admission(settings, facts)


def rule() -> Rule:
    fingerprint = load_sae("lab", 4).identity.fingerprint
    return Rule("rude", (RuleFeature(4, 3, 0.5, 2.0, 0.9, fingerprint),), {"counted": Counted(first=2).to_json()})


def test_a_watch_survives_its_text() -> None:
    switch = Watch.from_json(
        {"name": "s", "features": {"4/3": 0.1}, "then": "switch", "interventions": [ADD.to_json()], "where": "all"}
    )
    fitted = Watch.of_rule(rule(), where=Where.parse("generated:answer"), then="count")
    ask = Ask(watch=(Watch.from_json(BODY), switch, fitted), ticket="t", label="calm", end=7)
    assert Ask.from_text(ask.to_text()) == ask
    assert ask.watch[0].features == ((4, 678, 1.5), (5, 12, 0.0))
    assert ask.watch[0].where == Where.parse("generated")
    assert fitted.counted == Counted(first=2)
    assert fitted.by_phase


def test_a_rule_of_classify_fit_is_a_watch(admission: Admission, tmp_path: Path) -> None:
    rule().save(tmp_path / "rude.json")
    (alone,) = read_watches(tmp_path / "rude.json")
    body = {"name": "rude", "rule": json.loads((tmp_path / "rude.json").read_text())}
    assert alone == Watch.from_json(body)
    (tmp_path / "watch.json").write_text(json.dumps({"version": 1, "watch": [{**body, "then": "stop"}, BODY]}))
    assert [one.then for one in read_watches(tmp_path / "watch.json")] == ["stop", "stop"]
    assert admission.admit(Ask(watch=(alone,)), 10, 20).watch == (alone,)
    (feature,) = rule().features
    Rule("rude", (replace(feature, weight=1.0),), intercept=-0.5).save(tmp_path / "rude.json")
    with pytest.raises(InputError, match="weighs whole documents"):
        read_watches(tmp_path / "rude.json")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({**BODY, "features": {}}, "1 to 64 features"),
        ({**BODY, "features": {"678": 1.0}}, "678"),
        ({**BODY, "features": {"4/678": -1.0}}, "of at least 0"),
        ({**BODY, "features": {"4/678": float("nan")}}, "finite number"),
        ({**BODY, "features": ["4/678"]}, "an object with keys"),
        ({**BODY, "features": {"3/678": 1.0}}, "layer 3 is not served for reading; this server reads at: 4, 5"),
        ({**BODY, "features": {"4/9999": 1.0}}, "feature 4/9999 does not exist"),
        ({**BODY, "saes": {"4": "other"}}, "is about the SAE other of layer 4"),
        ({**BODY, "saes": {"x": "other"}}, "'x' is no layer"),
        ({**BODY, "then": "shout"}, "no `then` of 'shout'"),
        ({**BODY, "times": 0}, "between 1 and 1000000; got 0"),
        ({**BODY, "where": "never"}, "not a position or a phase"),
        ({**BODY, "where": "answer"}, "phases of tokens are known in chats alone"),
        ({**BODY, "name": "../x"}, "without / \\ :"),
        ({**BODY, "rule": {}}, "a watch has `features`"),
        ({"name": "x"}, "a watch has `features`"),
        ({"name": "x", "rule": {"version": 1}}, "not say it is of the format"),
        ({"features": {"4/1": 1.0}}, "lacks 'name'"),
        ({**BODY, "recipe": "calm"}, "has then: 'switch'"),
        ({**BODY, "then": "switch"}, "names a recipe or lists interventions"),
        ({**BODY, "then": "switch", "recipe": "clam"}, "there is no recipe 'clam'"),
        (
            {**BODY, "then": "switch", "interventions": [{**ADD.to_json(), "where": "3-9"}]},
            "its `where` is all or generated, not 3-9",
        ),
        (
            {**BODY, "then": "switch", "interventions": [{**ADD.to_json(), "hook_point": "layers.1.resid_post"}]},
            "layer 1 is not served for add",
        ),
        ({**BODY, "colour": 1}, "no key 'colour'"),
        (7, "an object with keys"),
    ],
)
def test_a_wrong_watch_is_refused_in_one_sentence(admission: Admission, body: Any, sentence: str) -> None:
    with pytest.raises(QwenScopeError) as caught:
        admission.admit(Ask.from_body({"watch": [body]}), 10, 20)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_watches_that_do_not_fit_together_are_refused(admission: Admission, facts: ModelFacts) -> None:
    switch = {"features": {"4/3": 0.1}, "then": "switch", "recipe": "calm"}
    for bodies, sentence in (
        ([BODY, BODY], "two watches have the name 'loops'"),
        ([{**BODY, "name": str(i)} for i in range(17)], "at most 16 watches"),
        ([{**switch, "name": str(i)} for i in range(3)], "can overlap in 7 ways, of which this server keeps 4"),
    ):
        with pytest.raises(QwenScopeError, match=sentence):
            admission.admit(Ask.from_body({"watch": bodies}), 10, 20)
    clamp = Intervention.clamp(layer=4, feature=7, amount=2.0)
    ask = Ask.from_body({"interventions": [clamp.to_json()], "watch": [
        {**switch, "name": "x", "recipe": None, "interventions": [clamp.to_json()]}]})  # fmt: skip
    with pytest.raises(QwenScopeError, match="set twice"):
        admission.admit(ask, 10, 20)
    blind = Admission(admission.settings, replace(facts, follows=False))
    special = Watch.from_json({**BODY, "counted": Counted(special=frozenset({1})).to_json()})
    with pytest.raises(QwenScopeError, match="--no-async-scheduling"):
        blind.admit(Ask(watch=(special,)), 10, 20)


def test_a_server_s_own_watches_come_first(facts: ModelFacts, tmp_path: Path) -> None:
    by_phase = {**BODY, "name": "phase", "where": "answer"}
    (tmp_path / "w.json").write_text(json.dumps({"version": 1, "watch": [BODY, by_phase]}))
    mine = Admission(ServeSettings(sae="lab", read_layers=(4, 5), watch=str(tmp_path / "w.json")), facts)
    own = Watch.from_json({**BODY, "name": "own"})
    kinds = PromptKinds.of([2] * 10, "default", "answer")
    assert [one.name for one in mine.watched(Ask(watch=(own,))).watch] == ["loops", "own"]
    assert [one.name for one in mine.watched(Ask(phases=kinds)).watch] == ["loops", "phase"]
    with pytest.raises(QwenScopeError, match="layer 5 is not served for reading"):
        Admission(ServeSettings(sae="lab", read_layers=(4,), watch=str(tmp_path / "w.json")), facts)
    with pytest.raises(QwenScopeError, match="two watches have the name"):
        mine.watched(Ask(watch=(replace(own, name="loops"),)))


def test_what_follows_a_possible_switch_has_a_key_of_its_own() -> None:
    class Request:
        num_prompt_tokens = 40

    switch = Watch.from_json(
        {"name": "s", "features": {"4/3": 0.1}, "then": "switch", "interventions": [ADD.to_json()]}
    )
    one, other = (BlockPlaces(Ask(watch=(switch,)), lambda: load_tokenizer("never")) for _ in range(2))
    assert one.key(Request, 0, 32) is None
    assert one.key(Request, 32, 64) == one.key(Request, 64, 96) != other.key(Request, 32, 64)


class Answers:
    """One request: its residuals by layer, and what a definition of a few lines says of its watches."""

    def __init__(self, rng: random.Random, number: int, watches: Sequence[Watch], kinds: PromptKinds | None) -> None:
        self.prompt, self.tokens = rng.randint(3, 20), rng.randint(24, 40)
        if kinds is not None:
            self.prompt = len(kinds.tokens)
        draw = torch.Generator().manual_seed(number)
        self.h = {layer: torch.randn(self.tokens, WIDTH, generator=draw) * 3 for layer in (4, 5)}
        self.ask = Ask(watch=tuple(watches), ticket=f"t{number}", end=END, phases=kinds, label="calm")
        self.name, self.at, self.reached, self.stopped = f"r{number}", 0, self.prompt, None

    def holds(self, watch: Watch, acts: dict[int, torch.Tensor]) -> list[int]:
        on = watch.where.mask(torch.arange(self.tokens)[None], torch.tensor([[self.prompt]]))[0]
        on &= watch.counted.at(torch.zeros(self.tokens, dtype=torch.int64))
        above = torch.zeros(self.tokens, dtype=torch.bool)
        for layer, feature, threshold in watch.features:
            above |= (acts[layer][:, feature] > threshold) & ~watch.counted.sinks(self.h[layer], layer)
        return (on & above).nonzero()[:, 0].tolist()


@pytest.fixture
def state() -> WorkerState:
    settings = ServeSettings(sae="lab", layers=(2,), feature_layers=(4,), read_layers=(4, 5), rows=8)
    shape = Shape(blocks=6, width=WIDTH, requests=8, tokens=512)
    return WorkerState(settings, shape, torch.float32, torch.device("cpu"), lambda: load_tokenizer(model_source("lab")))


def advance(state: WorkerState, batch: list[Answers], counts: list[int], wanted: dict[str, Any]) -> torch.Tensor:
    """One step as a runner makes it: rows of the tapped residuals, and logits of one row per request."""
    numbers = np.array([counts, [one.at for one in batch], [one.prompt for one in batch]], np.int64)
    step = Step(*numbers)
    state.begin(step, [wanted[one.name] for one in batch], [one.name for one in batch], lambda i, a, b: [0] * (b - a))
    for layer in (4, 5):
        rows = [one.h[layer][one.at : one.at + n] for one, n in zip(batch, counts, strict=True)]
        state.taps[layer][: step.tokens] = torch.cat(rows)
    return state.judged(torch.zeros(len(batch), 12))  # pyright: ignore[reportReturnType]


def drawn(rng: random.Random, name: str, then: str) -> Watch:
    """A random watch of one feature of layer 4 and thirty of layer 5, at random places."""
    norms = {f"layers.{layer}.resid_post": 36.0 for layer in (4, 5)}
    return Watch(
        name,
        ((4, rng.randrange(2048), 0.0), *((5, rng.randrange(2048), rng.uniform(0, 1)) for _ in range(30))),
        Where.parse(rng.choice(["all", "generated", "prompt", "5-30"])),
        then,
        rng.choice([1, 1, 2, 4]),
        rng.choice([Counted.everything(), Counted(first=3, norms=norms)]),
        interventions=(ADD,) if then == "switch" else (),
    )


def test_a_worker_decides_every_token_once_whatever_chunks_it_comes_in(state: WorkerState) -> None:
    rng = random.Random(0)
    waiting, going, done, wanted, preempted = list(range(40)), [], [], {}, 0
    while waiting or going:
        while waiting and len(going) < 6:
            watches = [drawn(rng, f"w{k}", rng.choice(["mark", "mark", "stop", "switch"])) for k in range(3)]
            one = Answers(rng, waiting.pop(0), watches, None)
            wanted[one.name] = state.wanted(one.ask.to_text())
            going.append(one)
        for one in going:
            if one.at and rng.random() < 0.15:
                one.at, preempted = 0, preempted + 1
                if rng.random() < 0.5:  # model runner V2 forgets a request that is preempted, and adds it anew
                    state.forget(wanted[one.name])
                    wanted[one.name] = state.wanted(one.ask.to_text())
        counts = [min(rng.choice([1, 3, 9]), one.reached - one.at) for one in going]
        logits = advance(state, going, counts, wanted)
        for one, n, row in zip(list(going), counts, logits, strict=True):
            one.at += n
            ended = bool(torch.isinf(row).any())
            assert not ended or (row[END] == 0 and int(row.isinf().sum()) == 11)
            if ended and one.at == one.reached:
                one.stopped = one.reached - 1
            one.reached += one.at == one.reached
            if one.stopped is not None or one.reached > one.tokens:
                going.remove(one)
                done.append(one)
                switched = wanted[one.name].switched
                assert set(switched) <= {w.name for w in one.ask.watch if w.then == "switch"}
                state.forget(wanted[one.name])
    assert preempted > 20
    assert sum(one.stopped is not None for one in done) > 5
    saes, total = {layer: load_sae("lab", layer) for layer in (4, 5)}, 0
    for one in done:
        acts = {layer: saes[layer].encode(h).to_dense() for layer, h in one.h.items()}
        computed = one.reached - 1
        ((_, found),) = state.watching.take(one.ask.ticket).items() or ((None, []),)
        known, stops = {}, []
        for watch in one.ask.watch:
            held = [p for p in one.holds(watch, acts) if p < computed]
            total += len(held)
            if len(held) >= watch.times:
                known[watch.name] = held[watch.times - 1]
                stops += [known[watch.name]] if watch.then == "stop" else []
        assert {alarm["watch"]: alarm["position"] for alarm in found} == known
        assert one.stopped == (max(one.prompt - 1, min(stops)) if stops else None)
    counted = state.watching.counted()
    assert sum(row[4] for row in counted["tokens"]) == total > 100
    assert state.status()["recipes"] == 0


def test_phases_are_counted_apart(state: WorkerState) -> None:
    kinds = PromptKinds.of([PHASES.index("user")] * 4 + [PHASES.index("answer")] * 2, "default", "answer")
    watch = Watch("w", ((4, 0, 0.0),), Where.parse("prompt:answer,generated"))
    one = Answers(random.Random(0), 0, [watch], kinds)
    wanted = {one.name: state.wanted(one.ask.to_text())}
    for n in (6, 1, 1, 1):
        advance(state, [one], [n], wanted)
        one.at += n
    rows = {row[2]: row[3] for row in state.watching.counted()["tokens"]}
    assert rows == {"prompt:answer": 2, "generated:answer": 3}


def test_names_of_clients_do_not_grow_the_metrics_without_end(state: WorkerState, monkeypatch: Any) -> None:
    monkeypatch.setattr("qwen_scope.serve.watching.MOST_SERIES", 3)
    for number in range(6):
        one = Answers(random.Random(0), number, [Watch(f"w{number}", ((4, 0, 0.0),), Where.parse("all"))], None)
        advance(state, [one], [3], {one.name: state.wanted(one.ask.to_text())})
    rows = state.watching.counted()["tokens"]
    assert [row[0] for row in rows] == ["w0", "w1", "w2", "other"]
    assert rows[-1][3] == 9


def test_alarms_of_a_client_that_has_gone_are_not_kept(state: WorkerState) -> None:
    """Its request may go on for a step or more; those of an ended request are forgotten as well."""
    gone, stays = (Answers(random.Random(0), number, [], None) for number in (0, 1))
    for one in (gone, stays):
        first = state.saes[4].encode(one.h[4][:4]).indices[:, 0].unique().tolist()
        watch = Watch("w", tuple((4, feature, 0.0) for feature in first), Where.parse("all"), times=3)
        one.ask = replace(one.ask, watch=(watch,))
    wanted = {one.name: state.wanted(one.ask.to_text()) for one in (gone, stays)}
    for _ in range(2):
        advance(state, [gone, stays], [2, 2], wanted)
        for one in (gone, stays):
            one.at += 2
        state.drop(gone.ask.ticket)
    assert state.watching.take(gone.ask.ticket) == {}
    assert [alarm["position"] for alarm in state.watching.take(stays.ask.ticket)[stays.name]] == [2]
    assert state.watching.progress(gone.name).next == 4
    state.watching.forget(gone.name)
    assert state.watching.progress(gone.name).next == 0
