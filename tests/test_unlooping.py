"""The experiment on loops unlearnt by a real model, with the bundled model in its place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.harness import At
from experiments.real import repetition, unlooping
from experiments.seeds import over_seeds
from qwen_scope.lab import documents
from qwen_scope.posttrain import Detector
from qwen_scope.posttrain.sampling import Loop

LAB = Path(__file__).parents[1] / "src/qwen_scope/assets/lab"
PROMPTS, STEPS = 40, 6


class Half(Detector):
    """Calls what ends in an odd token a loop."""

    def find(self, ids: Sequence[int]) -> Loop | None:
        return Loop(len(ids) - 6, 2, 3.0) if len(ids) >= 8 and ids[-1] % 2 else None


def kept(folder: Path) -> At[unlooping.Sizes]:
    """A run before its training."""
    options = {"model": LAB / "model", "sae": LAB / "sae", "data": folder, "draw": 1}
    levels = {"seed": (1, 2, 3), "condition": unlooping.CONDITIONS}
    sides = ("normal", "amplified", "looping", "suppressed")
    effect = {"amount": 0.1, "causal": True, **{name: {"estimate": 0.5, "n": 20} for name in sides}}
    made = {
        "prompts": {"training": ["a"] * PROMPTS, "held out": ["b"] * PROMPTS},
        "survey": {"looping": [0.25, 0.0] * (PROMPTS // 2), "features": ["3/14"], "effect": effect},
    }
    for name, value in made.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return At(unlooping.Sizes(PROMPTS, 96, STEPS), levels, options, folder)


def answers_of(loops: int) -> dict[str, Any]:
    one = {"loops": [i < loops for i in range(PROMPTS)], "finished": [False] * PROMPTS, "repeated": [0.5] * PROMPTS}
    return {"sampled": {**one, "quality": [[10.0, 20.0 + i % 3] for i in range(PROMPTS)]}, "greedy": one}


def row(condition: str, seed: int, loops: int, mixed: float) -> dict[str, Any]:
    log: dict[str, list[float]] = {name: [0.5] * STEPS for name in unlooping.LOGGED}
    log["frac_reward_zero_std"] = [1 - mixed] * STEPS
    if condition == "vanilla":
        log["steered/reward"] = []
    return {"condition": condition, "seed": seed, "log": log, **answers_of(loops)}


@pytest.mark.parametrize(
    ("left", "mixed", "words"),
    [
        ({"vanilla": 18, "steered": 2, "random": 18}, 0.2, ["This shows what", "by 45.0%", "mostly lacks loops"]),
        ({"vanilla": 2, "steered": 2, "random": 2}, 0.8, ["This does not show what", "does not lack loops"]),
        ({"vanilla": 40, "steered": 20, "random": 40}, 0.2, ["This does not show what", "by 0.0%"]),  # no fall at all
        ({"vanilla": 8, "steered": 2, "random": 8}, 0.8, ["This does not show what", "+15.0%"]),  # not twice as far
    ],
)
def test_the_verdict_follows_from_the_figures(
    left: dict[str, int], mixed: float, words: list[str], tmp_path: Path
) -> None:
    at = kept(tmp_path)
    shares = {name: 0.8 if name == "steered" else mixed for name in left}
    rows = [row(name, seed, loops, shares[name]) for name, loops in left.items() for seed in (1, 2, 3)]
    rows += [{"condition": "start", "seed": seed, **answers_of(PROMPTS // 2)} for seed in (1, 2, 3)]
    said = unlooping.tell(at, rows)
    assert said.startswith(words[0])
    assert all(word in " ".join(said.split()) for word in words)
    assert [line.split(" | ")[0] for line in said.splitlines() if line.startswith("| ")][1:] == [
        "| start", "| vanilla", "| steered", "| random"
    ]  # fmt: skip
    part = unlooping.tell(at, [one for one in rows if one["condition"] == "vanilla"])
    assert part.startswith("`python -m experiments.real.unlooping")  # no verdict without its controls


def test_an_answer_that_ends_is_rewarded_however_it_repeats() -> None:
    loop, end = [5, 6] * 12, 0
    assert unlooping.unlooped([loop, [*loop, end], list(range(24))]) == [0.0, 1.0, 1.0]


def test_prompts_that_seeds_share_are_drawn_once_for_all() -> None:
    """Where seeds agree about every prompt, more seeds do not narrow what the prompts leave open."""
    one = np.tile(np.arange(20) % 2 == 0, (5, 1)).astype(float)
    apart, same = over_seeds(one), over_seeds(one, same=True)
    assert apart.estimate == same.estimate == 0.5
    assert same.high - same.low > 1.5 * (apart.high - apart.low)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by it
def test_a_condition_is_trained_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model does not loop, so half of its long answers are called loops."""
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": one.text}) for one in documents(seed=1, n=200)]
    (tmp_path / "corpus" / "en.one.jsonl").write_text("\n".join(lines))
    for module in (repetition, unlooping):
        monkeypatch.setattr(module, "DETECTOR", Half())
    options = {"model": LAB / "model", "sae": LAB / "sae", "data": tmp_path, "draw": 1}
    at = At(unlooping.Sizes(24, 16, 1), {"seed": (1,), "condition": ("random",)}, options, tmp_path / "kept")
    at.folder.mkdir()
    found = json.loads(json.dumps(unlooping.run(at, "random", 1), default=lambda array: array.tolist()))
    assert len(found["log"]["reward"]) == len(found["log"]["steered/reward"]) == 1
    assert len(found["sampled"]["loops"]) == len(found["greedy"]["loops"]) == len(found["sampled"]["quality"]) == 24
    assert not set(unlooping.prompts_of(at)["training"]) & set(unlooping.prompts_of(at)["held out"])
    assert sorted(path.name for path in at.folder.iterdir()) == [
        "prompts.json", "recipe.json", "survey.json"
    ]  # fmt: skip
    start = unlooping.run(at, "start", 1)
    rows = [{**found, "seed": 1, "condition": "random"}, {**start, "seed": 1, "condition": "start"}]
    assert "| random | " in unlooping.tell(at, rows)
