"""Which interventions apply to each token of a step, against `steer.Where`, in random batches, chunks, preemptions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from qwen_scope.model import load_tokenizer
from qwen_scope.scope import model_source
from qwen_scope.serve import Ask, Pattern, PromptKinds, ServeSettings, Shape, Step, Tables, WorkerState
from qwen_scope.serve.compiled import Compiled
from qwen_scope.steer import Intervention, Where, change_reference
from qwen_scope.text import PHASES

PLACES = ["all", "prompt", "generated", "3-9", "0,5", "generated,2-4", "prompt,20-25", "7", "0-2,11-30"]
WIDTH, VOCABULARY = 128, 300


def direction(seed: int) -> list[float]:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)).tolist()


def recipe(rng: random.Random, places: Sequence[str]) -> tuple[Intervention, ...]:
    """One to three random interventions; layer 2 only adds, layer 4 does everything."""
    made, seen = [], set()
    for _ in range(rng.randint(1, 3)):
        op, where = rng.choice(["add", "add", "clamp", "scale", "ablate", "floor", "cap", "remove"]), rng.choice(places)
        feature = rng.randrange(64)
        if op == "add":
            made.append(
                Intervention.add(
                    layer=rng.choice([2, 4]), direction=direction(feature), amount=rng.uniform(-2, 2), where=where
                )
            )
        elif op == "remove":
            if "remove" in seen:
                continue
            made.append(Intervention.ablate(layer=4, direction=direction(feature), amount=0.5, where=where))
        elif feature not in seen:
            given = {} if op == "ablate" else {"amount": rng.uniform(-3, 3)}
            made.append(getattr(Intervention, op)(layer=4, feature=feature, where=where, **given))
        seen |= {op, feature}
    return tuple(made)


def test_numpy_places_are_those_of_where() -> None:
    rng = random.Random(0)
    phases = np.array([rng.randrange(len(PHASES)) for _ in range(40)], np.int8)
    for where in [*PLACES, "answer", "generated:thinking,3", "prompt:user,generated", "system,tool_call,9-12"]:
        pattern = Pattern.of([Where.parse(where)])
        for prompt in (0, 1, 7, 40):
            positions = np.arange(40)
            wanted = Where.parse(where).mask(
                torch.from_numpy(positions)[None], torch.tensor([[prompt]]), torch.from_numpy(phases)[None]
            )
            found = pattern.codes(positions, prompt, phases) == 1
            np.testing.assert_array_equal(found, wanted[0].numpy())


def test_every_code_that_comes_was_counted_as_possible() -> None:
    """Admission bounds a request's rows by `possible`; the steps below must never make another code."""
    rng = random.Random(1)
    for _ in range(60):
        wheres = [Where.parse(rng.choice([*PLACES, "answer", "prompt:user", "thinking"])) for _ in range(4)]
        pattern = Pattern.of(wheres)
        seen: set[int] = set()
        for prompt in range(0, 45, 3):
            phases = np.array([rng.randrange(len(PHASES)) for _ in range(45)], np.int8)
            seen |= set(pattern.codes(np.arange(45), prompt, phases).tolist())
        assert seen - {0} <= pattern.possible()


class Sequences:
    """A scheduler at its worst: random chunks, preemption to zero, requests that come and go."""

    def __init__(self, rng: random.Random, recipes: Sequence[tuple[Intervention, ...]], state: WorkerState) -> None:
        self.rng, self.recipes, self.state = rng, recipes, state
        self.running: list[dict] = []
        self.count = self.preempted = self.mixed = 0

    def step(self) -> list[dict]:
        while len(self.running) < 8 and (not self.running or self.rng.random() < 0.6):
            prompt, length = self.rng.randint(1, 30), self.rng.randint(1, 20)
            which = self.rng.choice([*self.recipes, ()])
            wanted = self.state.wanted(Ask(interventions=which).to_text()) if which else None
            self.running.append(
                {"name": str(self.count), "prompt": prompt, "end": prompt + length, "at": 0, "reached": prompt}
                | {"which": which, "wanted": wanted}
            )
            self.count += 1
        for one in self.running:
            if one["at"] > 0 and self.rng.random() < 0.1:
                one["at"], self.preempted = 0, self.preempted + 1
            # what is known may be computed in one chunk, across the end of the prompt after a preemption
            one["n"] = min(self.rng.choice([1, 2, 5, 17, 60]), one["reached"] - one["at"])
            self.mixed += one["at"] < one["prompt"] < one["at"] + one["n"]
        return self.running

    def done(self) -> None:
        for one in list(self.running):
            one["at"] += one["n"]
            if one["at"] == one["reached"]:
                one["reached"] += 1  # a token was generated
            if one["reached"] > one["end"]:
                self.running.remove(one)
                self.state.forget(one["wanted"])


@pytest.fixture
def state() -> WorkerState:
    settings = ServeSettings(sae="lab", layers=(2,), feature_layers=(4,), rows=24)
    shape = Shape(blocks=6, width=WIDTH, requests=8, tokens=512)
    return WorkerState(settings, shape, torch.float32, torch.device("cpu"), lambda: load_tokenizer(model_source("lab")))


@pytest.mark.slow
def test_the_residual_is_the_reference_whatever_chunks_its_tokens_come_in(state: WorkerState) -> None:
    rng = random.Random(2)
    recipes = [recipe(rng, PLACES) for _ in range(30)]
    going = Sequences(rng, recipes, state)
    for number in range(150):
        batch = going.step()
        step = Step(
            *(np.array([one[key] for one in batch], np.int64) for key in ("n", "at", "prompt")),
        )
        state.begin(step, [one["wanted"] for one in batch], [one["name"] for one in batch], no_tokens)
        total = step.tokens
        hidden, residual = torch.randn(2, total + 3, WIDTH, generator=torch.Generator().manual_seed(number)) * 3
        after = {2: hidden + residual, 4: hidden + state.set_features(hidden, residual, 4)}
        for layer in after:
            after[layer] = after[layer] + state.tables.by_layer[layer][state.rows[: total + 3]]
            torch.testing.assert_close(after[layer][total:], (hidden + residual)[total:], rtol=0, atol=0)
            for i, one in enumerate(batch):
                start = int(step.starts[i])
                for j in range(one["n"]):
                    h = (hidden + residual)[start + j : start + j + 1]
                    wanted = reference(one["which"], layer, h, one["at"] + j, one["prompt"], state)
                    torch.testing.assert_close(after[layer][start + j], wanted[0], rtol=1e-4, atol=1e-4)
        going.done()
    assert going.preempted > 20
    assert going.mixed > 5
    for one in going.running:
        state.forget(one["wanted"])
    assert state.status()["recipes"] == 0


@pytest.mark.parametrize("size", [1e20, 3e38, float("inf"), float("nan")])
def test_a_residual_too_large_to_be_read_stays_as_it_is(state: WorkerState, size: float) -> None:
    """The rows beside it are set all the same, and nothing is raised where vLLM would end with it."""
    wanted = state.wanted(Ask(interventions=(Intervention.clamp(layer=4, feature=1, amount=3.0),)).to_text())
    state.begin(Step(*(np.array([n]) for n in (5, 0, 5))), [wanted], ["a"], no_tokens)
    hidden, residual = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)) * 3
    residual[2] = size
    new = state.set_features(hidden, residual, 4)
    torch.testing.assert_close(new[2], residual[2], rtol=0, atol=0, equal_nan=True)
    rest = [0, 1, 3, 4]
    assert bool((new[rest] != residual[rest]).any(-1).all())
    assert bool(new[rest].isfinite().all())
    assert state.status()["skipped"] == 1


def test_a_change_after_which_a_residual_could_not_be_read_is_left_out(state: WorkerState) -> None:
    """Factors of two layers multiply, which no admission sees."""
    wanted = state.wanted(Ask(interventions=(Intervention.scale(layer=4, feature=1, amount=1e6),)).to_text())
    sae = state.saes[4]
    hidden, residual = torch.zeros(1, WIDTH), 1e11 * sae.W_enc[1][None].float()
    state.begin(Step(*(np.array([1]) for _ in range(3))), [wanted], ["a"], no_tokens)
    torch.testing.assert_close(state.set_features(hidden, residual, 4), residual, rtol=0, atol=0)
    assert state.status()["skipped"] == 1


def reference(
    which: Sequence[Intervention], layer: int, h: torch.Tensor, position: int, prompt: int, state: WorkerState
) -> torch.Tensor:
    """The residual of one token by the definitions alone."""
    at = [
        one
        for one in which
        if one.layer == layer and bool(one.where.mask(torch.tensor([[position]]), torch.tensor([[prompt]]))[0, 0])
    ]
    return change_reference(at, h, state.saes[4] if layer == 4 else None)


def no_tokens(request: int, first: int, end: int) -> Sequence[int]:
    raise AssertionError("nobody asked for phases")


def test_phases_are_followed_through_chunks_and_preemptions(state: WorkerState) -> None:
    """Generated tokens are prefilled again after a preemption; their phases are those of the first time."""
    tokenizer = load_tokenizer(model_source("lab"))
    think, end = (tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in ("<think>", "</think>"))
    generated = [5, *think, 6, 7, *end, 8, 9, 10]
    prompt = [PHASES.index("user")] * 4 + [PHASES.index("answer")] * 2
    kinds = PromptKinds.of(prompt, "default", "answer")
    ids = [3] * len(prompt) + generated
    ask = Ask(
        interventions=(Intervention.add(layer=2, direction=direction(0), amount=1.0, where="thinking,prompt:user"),),
        phases=kinds,
    )
    opens, closes = len(prompt) + 1, len(prompt) + 1 + len(think) + 2 + len(end)
    expected = [i < 4 or opens + len(think) - 1 <= i < closes for i in range(len(ids))]
    give: Callable[[int, int, int], Sequence[int]] = lambda i, first, last: ids[first:last]  # noqa: E731
    for chunks in ([len(prompt), *[1] * len(generated)], [len(ids)], [5, 3, len(ids) - 8]):
        wanted = state.wanted(ask.to_text())
        at = 0
        for n in chunks:
            state.begin(Step(np.array([n]), np.array([at]), np.array([len(prompt)])), [wanted], ["a"], give)
            assert (state.rows[:n] > 0).tolist() == expected[at : at + n]
            at += n
        state.forget(wanted)


def test_rows_are_taken_back_from_recipes_that_nobody_has() -> None:
    tables = Tables([0], 1 + 2, 4, torch.device("cpu"), torch.float32)
    made = [
        Compiled.of(
            [Intervention.add(layer=0, direction=[float(i + 1)] * 4, amount=1.0)],
            {},
            torch.device("cpu"),
            torch.float32,
        )
        for i in range(5)
    ]
    for i, one in enumerate(made):
        row = tables.row(one, 1, {one.key})
        assert tables.by_layer[0][row].tolist() == [float(i + 1)] * 4
        assert tables.row(one, 0, set()) == 0
    kept = tables.row(made[4], 1, set())
    tables.row(made[0], 1, {made[0].key, made[4].key})
    assert tables.row(made[4], 1, set()) == kept
    with pytest.raises(AssertionError, match="no row of 3 is free"):
        tables.row(made[1], 1, {made[0].key, made[4].key})
    assert not tables.by_layer[0][0].any()
