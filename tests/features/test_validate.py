"""Verdicts: the rules as a truth table, conditions by hand, and planted causes and correlates on the lab."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import tiny
import torch

from qwen_scope import load_scope
from qwen_scope.errors import InputError
from qwen_scope.features import (
    NOT_FLUENT,
    OUTCOMES,
    Evidence,
    Examples,
    Rules,
    ValidateOptions,
    answer_task,
    judge,
    matched_random,
    mean_direction,
    perplexity_ratio,
    validate,
)
from qwen_scope.stats import Interval, bootstrap, difference
from qwen_scope.steer import Decoding, Intervention, calibrate

INTERVENTIONS = [Intervention.add(layer=0, feature=3, amount=1.0, unit="resid_norm", where="prompt")]
FEW = Rules(fewest=3, fewest_random=2, fewest_shuffled=2)
EXAMPLES = Examples(
    ("Guten Morgen", "Wo ist der Bahnhof", "bitte"), ("The weather", "is fine", "today"), ("a + b", "def add", "(a, b)")
)
PROMPTS = ["The weather", "a", "bc"]


@pytest.fixture(scope="module")
def scope():
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")


def interval(low: float) -> Interval:
    return Interval(low + 0.1, low, low + 0.2, 30)


GOOD = {"gain": 0.3, "over_random": 0.3, "over_opposite": 0.3, "over_shuffled": 0.3}


def evidence(
    detects: bool = True,
    harm: bool = False,
    task: bool = False,
    beaten: int = 0,
    ratio: float = 1.2,
    repeats: float = 0.0,
    **lows,
) -> Evidence:
    chosen = {name: interval(low) for name, low in {**GOOD, **lows}.items()}
    return Evidence(
        **chosen,
        over_each_random=beaten,
        detection=interval(0.5 if detects else -0.1),
        side=interval(0.1 if harm else -0.5),
        fluency=Interval(ratio, 0.5 * ratio, 2 * ratio, 30),
        repetition=Interval(repeats, repeats - 0.2, repeats + 0.2, 30),
        tasks={"sums": interval(0.3 if task else -0.1)},
    )


def test_the_rules_as_a_table() -> None:
    assert judge(evidence(), Rules())[0] == "causal"
    assert judge(evidence(detects=False), Rules())[0] == "causal"
    assert judge(evidence(harm=True), Rules())[0] == "entangled"
    assert judge(evidence(task=True), Rules())[0] == "entangled"
    for name, detects in product(GOOD, (True, False)):
        expected = "correlated only" if detects else "no effect"
        assert judge(evidence(detects=detects, **{name: -0.05}), Rules())[0] == expected
    assert judge(evidence(beaten=1), Rules())[0] == "correlated only"
    assert judge(evidence(gain=0.05), Rules())[0] == "correlated only", "significant but smaller than the margin"
    _, reasons = judge(evidence(), Rules())
    assert len(reasons) == 10
    assert all(reason.startswith(("yes: ", "no: ")) for reason in reasons)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"ratio": 8.0 / 3.5}, NOT_FLUENT),
        ({"ratio": 2.0}, "causal"),
        ({"ratio": 2.01}, NOT_FLUENT),
        ({"ratio": 0.2}, "causal"),
        ({"repeats": 0.1}, "causal"),
        ({"repeats": 0.3}, NOT_FLUENT),
        ({"ratio": 90.0, "repeats": 0.9}, NOT_FLUENT),
        ({"ratio": 3.0, "harm": True}, "entangled"),
        ({"ratio": 3.0, "task": True}, "entangled"),
        ({"ratio": 3.0, "gain": -0.1}, "correlated only"),
        ({"ratio": 3.0, "gain": -0.1, "detects": False}, "no effect"),
    ],
)
def test_text_outside_the_fluency_budget_is_never_plainly_causal(found: dict, expected: str) -> None:
    outcome, reasons = judge(evidence(**found), Rules())
    assert outcome == expected
    assert outcome in OUTCOMES
    held = found.get("ratio", 1.2) <= 2
    assert any(line.startswith(f"{'yes' if held else 'no'}: the text keeps within 2 times") for line in reasons)
    assert judge(evidence(**found), Rules(perplexity_ratio=100, repetition=1))[0] != NOT_FLUENT


@pytest.mark.parametrize(
    "wrong",
    [
        {"margin": math.nan},
        {"margin": -0.1},
        {"margin": True},
        {"perplexity_ratio": 0.5},
        {"perplexity_ratio": math.inf},
        {"perplexity_ratio": math.nan},
        {"repetition": -1.0},
        {"fewest": True},
        {"fewest_random": 0},
        {"fewest_shuffled": 1},
    ],
)
def test_rules_that_mean_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} of the rules"):
        Rules(**wrong)


def test_the_perplexity_ratio_is_over_all_tokens() -> None:
    """Restated token by token; a text twice as improbable per token has twice the perplexity, whatever its length."""
    rng = np.random.default_rng(0)
    plain = [-rng.random(n) for n in (3, 0, 40, 7)]
    steered = [row - math.log(2) for row in plain]
    found = perplexity_ratio(steered, plain, paired=True)
    assert found.estimate == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2, 2)), "pairs move together"
    apart = perplexity_ratio(steered, plain, paired=False)
    assert apart.estimate == pytest.approx(2)
    assert apart.low < 2 < apart.high
    uneven = perplexity_ratio([np.full(9, -1.0), np.full(1, -5.0)], [np.full(2, -1.0)], paired=False)
    assert uneven.estimate == pytest.approx(math.exp((9 + 5) / 10 - 1))
    for one, other, which in (([np.zeros(0)], plain, "changed"), (plain, [np.zeros(0)], "unsteered")):
        with pytest.raises(InputError, match=f"the {which} continuations hold no token"):
            perplexity_ratio(one, other, paired=False)


def test_one_unlucky_shuffle_does_not_decide() -> None:
    """The German feature of the lab turned 12 of 24 texts, one shuffle of nine 34% by chance: as one control they are
    0.08. The single unlucky one would not have been told from the feature."""
    feature = np.array([1.0] * 12 + [0.0] * 12)
    shuffles = np.array([0.0, 0.03, 0.34, 0.1, 0.0, 0.06, 0.12, 0.03, 0.0])
    assert difference(feature, shuffles).low > 0
    unlucky = np.array([1.0] * 8 + [0.0] * 16)
    assert difference(feature, unlucky).low < 0


def test_random_features_fire_about_as_often_and_write_as_much(scope) -> None:
    sae = scope.saes[0]
    stats = {0: calibrate(scope.model, scope.tokenizer, 0, sae)}
    (one,) = INTERVENTIONS
    raw = one.resolve(stats[0], sae)
    seen = set()
    for seed in range(20):
        (other,) = matched_random([raw], scope.saes, stats, np.random.default_rng(seed))
        assert other.feature != raw.feature
        a, b = (i.amount * i.vector(sae) for i in (raw, other))
        assert float(b.norm()) == pytest.approx(float(a.norm()), rel=1e-4)
        assert other.where == raw.where
        seen.add(other.feature)
    assert len(seen) > 5
    kept = min(seen)
    avoided = {0: set(range(sae.d_sae)) - {kept}}
    (only,) = matched_random([raw], scope.saes, stats, np.random.default_rng(0), avoided)
    assert only.feature == kept
    with pytest.raises(InputError, match="no other feature to compare with"):
        matched_random([raw], scope.saes, stats, np.random.default_rng(0), {0: range(sae.d_sae)})


def test_the_direction_is_the_difference_of_two_means(scope) -> None:
    sides = []
    for texts in (EXAMPLES.positive, EXAMPLES.negative):
        rows = [scope.capture(scope.tokenize([text]), [0])[0][0, 1:] for text in texts]
        sides.append(torch.cat(rows).mean(0))
    found = mean_direction(scope, 0, EXAMPLES.positive, EXAMPLES.negative)
    torch.testing.assert_close(found, sides[0] - sides[1], atol=1e-5, rtol=1e-5)


def run(scope, **options):
    options = {
        "rules": FEW,
        "n_random": 2,
        "n_shuffled": 3,
        "decoding": Decoding(max_new_tokens=4),
        "examples": EXAMPLES,
        "prompts": PROMPTS,
        "interventions": INTERVENTIONS,
    } | options
    interventions, prompts, examples = (options.pop(name) for name in ("interventions", "prompts", "examples"))
    target = options.pop("target", lambda texts: np.array([float(len(text)) for text in texts]))
    asked = {
        name: options.pop(name) for name in ("lower", "n_random", "n_shuffled", "rules", "seed") if name in options
    }
    return validate(scope, interventions, target, prompts, examples, ValidateOptions(**asked), **options)


@pytest.mark.slow
def test_a_verdict_has_every_arm_and_is_reproducible(scope) -> None:
    found = run(scope)
    names = [condition.name for condition in found.conditions]
    assert names[:6] == [
        "unsteered",
        "this feature",
        "the opposite sign",
        "difference of means",
        "shuffled labels",
        "prompting alone",
    ]
    assert names[6:] == ["random feature 1", "random feature 2"]
    assert [condition.name for condition in found.shuffled] == [f"shuffled labels {i}" for i in range(1, 4)]
    each = [condition.effect.estimate for condition in found.shuffled]
    assert len(set(each)) > 1, "every shuffle draws anew"
    pooled = found.conditions[4].effect
    assert pooled.estimate == pytest.approx(np.mean(each))
    assert (pooled.n, pooled.low) == (3, pytest.approx(bootstrap(each).low))
    over = found.evidence.over_shuffled
    assert over.estimate == pytest.approx(found.conditions[1].effect.estimate - np.mean(each))
    assert found.evidence.fluency.estimate == pytest.approx(
        found.conditions[1].perplexity / found.conditions[0].perplexity
    )
    rise = found.conditions[1].repetition - found.conditions[0].repetition
    assert found.evidence.repetition.estimate == pytest.approx(rise)
    plain = scope.generate(PROMPTS, decoding=Decoding(max_new_tokens=4))
    assert found.conditions[0].effect.estimate == pytest.approx(np.mean([len(g.text) for g in plain]))
    assert found.side.kl.estimate > 0
    assert 3 not in [moved.feature for moved in found.side.moved]
    json.dumps(found.to_json(), allow_nan=False)
    assert run(scope) == found


@pytest.mark.slow
def test_a_task_that_breaks_entangles_at_most(scope) -> None:
    found = run(scope, tasks={"sums": lambda interventions: np.full(5, 0.0 if interventions else 1.0)})
    assert found.evidence.tasks["sums"].estimate == 1.0
    assert found.outcome != "causal"


def test_a_task_counts_whole_words(scope) -> None:
    texts = [one.text for one in scope.generate(PROMPTS, decoding=Decoding(max_new_tokens=6))]
    word = next(part for part in re.findall(r"\w+", " ".join(texts)))
    expected = [float(re.search(rf"(?<!\w){word}(?!\w)", text) is not None) for text in texts]
    task = answer_task(scope, [(prompt, word) for prompt in PROMPTS], max_new_tokens=6)
    assert task([]).tolist() == expected
    assert any(expected)
    with pytest.raises(InputError, match="not empty"):
        answer_task(scope, [("a", "b"), ("c", " ")])


def test_too_few_samples_give_no_verdict(scope) -> None:
    for options in (
        {"prompts": PROMPTS[:2]},
        {"examples": replace(EXAMPLES, unrelated=("a",))},
        {"n_random": 1},
        {"n_shuffled": 1},
    ):
        with pytest.raises(InputError, match="too few for a verdict"):
            run(scope, **options)
    for name, wrong in (("n_random", -3), ("n_random", True), ("n_shuffled", -1)):
        with pytest.raises(InputError, match=f"{name} must be a whole number"):
            run(scope, **{name: wrong})
    with pytest.raises(InputError, match="features that are added"):
        run(scope, interventions=[Intervention.ablate(layer=0, feature=1)])


@pytest.mark.slow
def test_a_prompt_that_says_it_all_is_no_knob(scope) -> None:
    """A target that nothing moves: no effect, whatever the feature detects."""
    found = run(scope, target=lambda texts: np.ones(len(texts)))
    assert found.outcome in ("no effect", "correlated only")
    assert found.evidence.gain.estimate == 0


@pytest.mark.slow
def test_the_command(capsys, tmp_path) -> None:
    from qwen_scope.cli import main

    paths = {}
    for name in ("prompts", "positive", "negative", "unrelated"):
        paths[name] = tmp_path / f"{name}.txt"
        words = ("Morgen", "Bahnhof") if name == "positive" else ("The weather", "today")
        paths[name].write_text("".join(f"{word} {i}\n" for i in range(10) for word in words))
    where = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]
    argv = ["validate", str(paths["prompts"]), *where, "--feature", "0/3", "--amount", "0.5"]
    argv += [f"--{name}={paths[name]}" for name in ("positive", "negative", "unrelated")]
    argv += ["--regex", "[aeiou]", "--max-new-tokens", "3"]
    assert main([*argv, "--selectivity"]) == 0
    said = capsys.readouterr().out
    assert "Verdict: " in said
    assert "9 shuffles as one control" in said
    assert "Removal at equal effect" in said
    assert main([*argv, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["outcome"] in OUTCOMES
    assert len(data["conditions"]) == 25
    assert len(data["shuffled"]) == 9
    assert data["rules"]["perplexity_ratio"] == 2.0
    assert {"fluency", "repetition"} <= set(data["evidence"])
    extras = tmp_path / "tasks.jsonl"
    extras.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": str(i + 1)}) + "\n" for i in range(3)))
    fewer = ["--shuffled", "5", "--max-perplexity", "1.5", "--reference", str(paths["unrelated"])]
    assert main([*argv, *fewer, "--json", "--chat", "non_thinking", "--tasks", str(extras), "--selectivity"]) == 0
    chatted = json.loads(capsys.readouterr().out)
    assert len(chatted["shuffled"]) == 5
    assert chatted["rules"]["perplexity_ratio"] == 1.5
    counted = chatted["conditions"][1]["perplexity"] / chatted["evidence"]["fluency"]["estimate"]
    assert counted != pytest.approx(chatted["conditions"][0]["perplexity"]), "counted from the reference"
    assert chatted["conditions"][0]["example"] != data["conditions"][0]["example"]
    assert chatted["evidence"]["tasks"]["the task"]["n"] == 3
    assert {"features", "direction", "gap"} <= set(chatted["selectivity"])
    extras.write_text("{}\n")
    assert main([*argv, "--tasks", str(extras)]) == 2
    assert "line 1 of tasks.jsonl is not" in capsys.readouterr().err
    same = [f"--negative={paths['positive']}" if part.startswith("--negative") else part for part in argv]
    assert main(same) == 2
    assert "do not differ" in capsys.readouterr().err
    for extra, says in (
        (["--random", "3"], "too few"),
        (["--shuffled", "2"], "too few"),
        (["--max-perplexity", "nan"], "finite"),
        (["--amount", "nan"], "finite"),
        (["--feature", "1/3"], "no SAE"),
    ):
        assert main([*argv, *extra]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
