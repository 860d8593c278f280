"""Counts and numbers that can't be are refused where they enter the room `posttrain`, before anything is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import posttrain_tiny as small
import pytest
import tiny

from qwen_scope import load_scope
from qwen_scope.errors import InputError
from qwen_scope.posttrain import (
    Detector,
    LabWriter,
    Monitor,
    ProbePrompts,
    RLRun,
    Sampling,
    SFTRun,
    SynthesisOptions,
    code_switch_ratio,
    lab_rows,
    loop_share,
    prepare,
    read_samples,
    repetition_recipe,
)
from qwen_scope.posttrain.rl import last_rewards

LABELLED = [("a", "The weather is fine."), ("b", "Guten Morgen.")]
TWO = ["hello ", "Guten "]
OUT = Path("never")


@cache
def tiny_scope():
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae")


@pytest.fixture
def scope():
    return tiny_scope()


@cache
def tokenizer():
    return small.model()[1]


def monitor(**more) -> Monitor:
    return Monitor(small.saes(), tokenizer(), TWO, OUT, **more)


COUNTS: dict[str, Callable] = {
    "read_samples": lambda scope, n: read_samples("lab", n=n),
    "last_rewards": lambda scope, n: last_rewards([{"reward": 1.0}, {"reward": 2.0}], n),
    "loop_share": lambda scope, n: loop_share(scope.model, scope.tokenizer, TWO, samples=n),
    "code_switch_ratio": lambda scope, n: code_switch_ratio(scope.model, scope.tokenizer, TWO, "CJK", samples=n),
    "recipe, samples": lambda scope, n: repetition_recipe(scope, TWO, samples=n),
    "recipe, features": lambda scope, n: repetition_recipe(scope, TWO, features=n),
    "prepare": lambda scope, n: prepare(scope, LABELLED, "a", features=n),
    "longest": lambda scope, n: Detector(longest=n),
    "times": lambda scope, n: Detector(times=n),
    "least": lambda scope, n: Detector(least=n),
    "new tokens of Sampling": lambda scope, n: Sampling(n),
    "new tokens of ProbePrompts": lambda scope, n: ProbePrompts(TWO, n),
    "at_start": lambda scope, n: ProbePrompts(TWO, at_start=n),
    **{
        f"RLRun, {name}": lambda scope, n, name=name: RLRun("lab", OUT, **{name: n})
        for name in ("prompts", "micro", "steps", "updates", "max_new_tokens", "lora")
    },
    **{
        f"SFTRun, {name}": lambda scope, n, name=name: SFTRun("lab", OUT, **{name: n})
        for name in ("batch", "accumulate", "max_length", "lora", "watch_every", "log_every")
    },
    **{
        f"synthesis, {name}": lambda scope, n, name=name: SynthesisOptions(**{name: n})
        for name in ("want", "budget", "tries", "batch", "shown", "max_answer_tokens")
    },
}


@pytest.mark.parametrize("wrong", [-3, 0, True])
@pytest.mark.parametrize("name", COUNTS)
def test_a_wrong_count_is_refused(scope, name: str, wrong) -> None:
    with pytest.raises(InputError, match=r"must be a whole number of at least \d|is a block of at least"):
        COUNTS[name](scope, wrong)


FROM_ZERO: dict[str, Callable] = {
    "top": lambda n: monitor(top=n),
    "lab_rows": lambda n: lab_rows(n),
    "seed of samples": lambda n: read_samples("lab", n=2, seed=n),
    "seed of Sampling": lambda n: Sampling(seed=n),
    "seed of ProbePrompts": lambda n: ProbePrompts(TWO, seed=n),
    **{
        f"{kind.__name__}, {name}": lambda n, kind=kind, name=name: kind("lab", OUT, **{name: n})
        for kind in (SFTRun, RLRun)
        for name in ("warmup", "save_every", "seed")
    },
}


@pytest.mark.parametrize("wrong", [-1, True])
@pytest.mark.parametrize("name", FROM_ZERO)
def test_a_count_from_zero_is_refused_below(name: str, wrong) -> None:
    with pytest.raises(InputError, match="must be a whole number of at least 0"):
        FROM_ZERO[name](wrong)


@pytest.mark.parametrize("wrong", [-1, 0, True])
def test_a_cadence_and_a_group_are_counts(wrong) -> None:
    with pytest.raises(InputError):
        monitor(every=wrong)
    with pytest.raises(InputError):
        RLRun("lab", OUT, group=wrong)


NUMBERS: dict[str, Callable] = {
    "alarm": lambda x: monitor(alarm=x),
    "rise_in_generation": lambda x: monitor(rise_in_generation=x),
    "drift_alarm": lambda x: monitor(drift_alarm=x),
    "share": lambda x: monitor(share=x),
    "quantile": lambda x: prepare(tiny_scope(), LABELLED, "a", quantile=x),
    "temperature of Sampling": lambda x: Sampling(temperature=x),
    "top_p of Sampling": lambda x: Sampling(top_p=x),
    "temperature of ProbePrompts": lambda x: ProbePrompts(TWO, temperature=x),
    "top_p of ProbePrompts": lambda x: ProbePrompts(TWO, top_p=x),
    "amount": lambda x: repetition_recipe(tiny_scope(), TWO, amount=x),
    "temperature of a synthesis": lambda x: SynthesisOptions(temperature=x),
    "sums": lambda x: lab_rows(4, sums=x),
    "error_rate": LabWriter,
    **{
        f"{kind.__name__}, {name}": lambda x, kind=kind, name=name: kind("lab", OUT, **{name: x})
        for kind, names in (
            (SFTRun, ("lr", "epochs", "weight_decay", "weight")),
            (RLRun, ("lr", "temperature", "top_p", "epsilon_low", "epsilon_high")),
        )
        for name in names
    },
}


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_is_refused(name: str, wrong) -> None:
    with pytest.raises(InputError):
        NUMBERS[name](wrong)


def test_what_is_right_is_taken(scope) -> None:
    assert len(read_samples("lab", n=1)) == 1
    rewards = [{"reward": float(i)} for i in range(12)]
    assert last_rewards(rewards) == {"reward": 6.5}
    assert last_rewards(rewards, 1) == {"reward": 11.0}
    assert last_rewards(rewards, 100) == {"reward": 5.5}
    assert monitor(top=0, every=1, share=1.0, rise_in_generation=0.5, drift_alarm=1e-3).top == 0
    assert RLRun("lab", OUT, epsilon_low=0, top_p=1).group == 8
    assert lab_rows(0) == []
