"""Steered rollouts: group composition, unsteered probabilities, hooks, methods, resuming, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from qwen_scope.cli import main
from qwen_scope.errors import InputError, MismatchError, NotFoundError, QwenScopeError
from qwen_scope.model import load_model
from qwen_scope.posttrain import Detector, RLRun, SteeredTrainer, run_rl
from qwen_scope.posttrain.loops import loop_share
from qwen_scope.posttrain.rl import expected_warnings, rollouts_of, trainer_of
from qwen_scope.steer import Intervention, Recipe
from qwen_scope.train import DivergedError

MODEL, SAE = tiny.folder() / "model", tiny.folder() / "sae"
ROWS = [{"prompt": text, "answer": "e"} for text in ("hello ", "Guten ", "Where is ", "def ", "the weather ")]
NEW = 6


def letters(completions: list[str], **rest: Any) -> list[float]:
    """A reward with some spread on a random model."""
    return [float(sum(char.isalpha() for char in text)) for text in completions]


def told(out: Path, **more: Any) -> RLRun:
    plain: dict[str, Any] = {
        "reward": "test_rl:letters",
        "sae": str(SAE),
        "group": 4,
        "prompts": 2,
        "micro": 4,
        "steps": 2,
        "lr": 1e-3,
        "max_new_tokens": NEW,
        "device": "cpu",
    }
    return RLRun(str(MODEL), out, **plain | more)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Large changes, so that steered answers differ from ordinary ones in every group."""
    interventions = [Intervention.add(layer=layer, feature=feature, amount=30.0) for layer, feature in ((0, 5), (2, 9))]
    saes = {layer: tiny.random_sae(layer) for layer in (0, 2)}
    return Recipe.of("test", load_model(MODEL, device="cpu").model, interventions, saes, effect={"causal": True})


@pytest.mark.slow
def test_a_run_of_each_method(tmp_path, recipe) -> None:
    for method in ("steered", "random", "vanilla"):
        out = tmp_path / method
        found = run_rl(told(out, method=method), ROWS, recipe=None if method == "vanilla" else recipe)
        assert found["steps"] == 2
        facts = json.loads((out / "run.json").read_text())
        assert len(facts["interventions"]) == (0 if method == "vanilla" else 2)
        assert ("steered_reward" in found) is (method != "vanilla")
        assert load_model(out / "model", device="cpu").model.dtype == torch.float32


def greedy(model: Any, ids: list[int], interventions: Any = ()) -> list[int]:
    """The likeliest continuation by hand, with plain hooks of torch that add the vectors at every step."""
    handles = []
    for one in interventions:
        d = one.amount * tiny.random_sae(one.layer).W_dec[:, one.feature]
        handles.append(model.model.layers[one.layer].register_forward_hook(lambda m, a, out, d=d: out + d))
    out: list[int] = []
    with torch.no_grad():
        while len(out) < NEW and (not out or out[-1] not in (1, 395)):
            out.append(int(model(torch.tensor([ids + out])).logits[0, -1].argmax()))
    for handle in handles:
        handle.remove()
    return out


def test_one_steered_answer_in_every_group(tmp_path, recipe, monkeypatch) -> None:
    loaded = load_model(MODEL, device="cpu")
    run = told(tmp_path, temperature=1e-4)
    rollouts: Any = rollouts_of(run, loaded, recipe)
    trainer: Any = trainer_of(run, loaded, ROWS, rollouts, [])
    trainer.model.train()
    prompts = ["hello "] * 4 + ["Guten "] * 4
    with expected_warnings():
        found = rollouts(prompts, trainer)
    assert found["steered"] == [False, False, False, True] * 2
    assert found["logprobs"] is None
    for i, prompt in enumerate(prompts):
        ids = loaded.tokenizer(prompt)["input_ids"]
        assert found["prompt_ids"][i] == ids
        expected = greedy(loaded.model, ids, recipe.interventions if found["steered"][i] else ())
        assert found["completion_ids"][i] == expected
    assert found["completion_ids"][3] != found["completion_ids"][2]

    with pytest.raises(InputError, match="repeated 4 times"):
        rollouts([*prompts[:3], "def ", *prompts[4:]], trainer)
    trainer.model.eval()
    with expected_warnings():
        assert not any(rollouts(prompts[:4], trainer)["steered"])
    trainer.model.train()

    own, seen = trainer._generate_single_turn, []

    def failing(*asked: Any) -> Any:
        seen.append(hooks(loaded.model))
        if len(seen) == 2:
            raise RuntimeError("the power is gone")
        return own(*asked)

    before = loaded.model(torch.tensor([[7, 8, 9]])).logits
    monkeypatch.setattr(trainer, "_generate_single_turn", failing)
    with expected_warnings(), pytest.raises(RuntimeError, match="power"):
        rollouts(prompts, trainer)
    assert seen[1] > seen[0] == hooks(loaded.model)
    assert torch.equal(loaded.model(torch.tensor([[7, 8, 9]])).logits, before)


def hooks(model: Any) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@pytest.mark.slow
def test_old_probabilities_are_the_unsteered_policys(tmp_path, recipe, monkeypatch) -> None:
    """With two updates per answer TRL keeps the old log-probabilities; they equal a forward pass without any hook."""
    kept: list[dict[str, Any]] = []
    own = SteeredTrainer.compute_loss

    def watching(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        if self.state.global_step == 0:
            kept.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        return own(self, model, inputs, *rest, **named)

    monkeypatch.setattr(SteeredTrainer, "compute_loss", watching)
    run_rl(told(tmp_path, updates=2), ROWS, recipe=recipe)
    policy = load_model(MODEL, device="cpu").model
    rows = 0
    for batch in kept:
        for i in range(len(batch["prompt_ids"])):
            asked = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            said = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
            with torch.no_grad():
                logits = policy(torch.cat([asked, said])[None]).logits[0, len(asked) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, said[:, None])[:, 0]
            old = batch["old_per_token_logps"][i, : len(said)]
            torch.testing.assert_close(old, expected, atol=1e-4, rtol=1e-4)
            rows += 1
    assert rows == 8  # two groups of four, the steered answers among them


def logged(path: Path) -> list[dict[str, float]]:
    """A log without what a clock says."""
    clocks = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "profiling/")
    found = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [{name: x for name, x in line.items() if not name.startswith(clocks)} for line in found]


@pytest.mark.slow
def test_the_loops_of_the_start_are_those_of_the_first_part(tmp_path, recipe, monkeypatch) -> None:
    """They are measured once, before training; a run that goes on reports them all the same."""
    asked = [row["prompt"] for row in ROWS]
    short = {"detector": Detector(longest=2, times=2, least=2), "save_every": 1}
    first = run_rl(told(tmp_path, **short), ROWS, asked, recipe)
    measured = []
    monkeypatch.setattr(sys.modules[run_rl.__module__], "loop_share", lambda *a: measured.append(1) or loop_share(*a))
    again = run_rl(told(tmp_path, resume=True, **short), ROWS, asked, recipe)
    assert len(measured) == 1, "after training alone"
    assert again == first


def test_checkpoints_do_not_fall_between_updates(tmp_path) -> None:
    assert told(tmp_path, updates=2, save_every=4).save_every == 4
    with pytest.raises(InputError, match="a multiple of updates, not 3"):
        told(tmp_path, updates=2, save_every=3)


@pytest.mark.slow
def test_resuming_ends_where_an_unbroken_run_does(tmp_path, recipe) -> None:
    rows = [*ROWS, *({"prompt": f"{text} ", "answer": "e"} for text in ("station", "Bahnhof", "return", "bitte"))]
    run_rl(told(tmp_path / "whole", steps=3), rows, recipe=recipe)
    run_rl(told(tmp_path / "parts", steps=2, save_every=1), rows, recipe=recipe)
    with pytest.raises(InputError, match="set save_every"):
        told(tmp_path / "parts", resume=True)
    found = run_rl(told(tmp_path / "parts", steps=3, save_every=1, resume=True), rows, recipe=recipe)
    assert found["steps"] == 3
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3], "no line twice"
    whole, parts = (logged(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, abs=1e-4, nan_ok=True)
    whole, parts = (load_model(tmp_path / name / "model", device="cpu").model for name in ("whole", "parts"))
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with pytest.raises(NotFoundError, match="no checkpoint"):
        run_rl(told(tmp_path / "none", save_every=1, resume=True), ROWS, recipe=recipe)
    assert not (tmp_path / "none").exists()


def test_adapters_and_loop_shares(tmp_path, recipe) -> None:
    rules = Detector(4, 2, 2)
    found = run_rl(told(tmp_path, lora=2, steps=1, detector=rules), ROWS, ["hello ", "Wo ", "def "], recipe)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert 0 <= found["loop_share_before"]["estimate"] <= 1
    assert set(found["loop_share_after"]) == {"estimate", "low", "high", "n", "level"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == found


def test_rollouts_in_half_precision_read_the_head_packed(tmp_path) -> None:
    """Unpacked, the first token of a batch copies the head's weights once per answer."""
    packed = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            head = model.get_output_embeddings()
            head.register_forward_pre_hook(lambda module, inputs: packed.append(inputs[0].is_contiguous()))

    run = told(tmp_path, method="vanilla", dtype="bfloat16")
    run_rl(run, ROWS, callbacks=[Look()])
    assert len(packed) >= NEW
    assert all(packed)


def test_numbers_that_are_none_end_the_run(tmp_path, recipe) -> None:
    with pytest.raises(DivergedError, match="not finite numbers at step"):
        run_rl(told(tmp_path, lr=1e38, steps=3), ROWS, recipe=recipe)
    assert not (tmp_path / "model").exists()


def test_a_full_disk_is_said(tmp_path, recipe) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QwenScopeError, match="can't be written"):
        run_rl(told(tmp_path / "file" / "run"), ROWS, recipe=recipe)


def test_what_is_refused(tmp_path, recipe) -> None:
    for wrong, said in (
        ({"method": "magic"}, "the method is one of"),
        ({"group": 1}, "at least two answers"),
        ({"micro": 3}, "don't divide"),
        ({"lr": 0.0}, "lr must be greater than 0"),
    ):
        with pytest.raises(InputError, match=said):
            told(tmp_path, **wrong)
    with pytest.raises(InputError, match="no prompt"):
        run_rl(told(tmp_path), [], recipe=recipe)
    with pytest.raises(InputError, match="a step takes 2 prompts"):
        run_rl(told(tmp_path), ROWS[:1], recipe=recipe)
    with pytest.raises(InputError, match="needs a column 'language'"):
        run_rl(told(tmp_path, reward="lab"), ROWS, recipe=recipe)
    loaded = load_model(MODEL, device="cpu")
    for found, said in (
        (None, "needs a recipe"),
        (replace(recipe, effect={}), "was not made"),
        (
            replace(recipe, effect={"causal": False, "raises": {"estimate": 0.02, "low": -0.1, "high": 0.2}}),
            r"did not hold: it raises looping by 2.0% \[-10.0%, 20.0%\]",
        ),
    ):
        with pytest.raises(InputError, match=said):
            rollouts_of(told(tmp_path), loaded, found)
    assert rollouts_of(told(tmp_path, unchecked=True), loaded, replace(recipe, effect={}))
    foreign = replace(recipe.interventions[0], sae=replace(recipe.interventions[0].sae, fingerprint="f" * 64))
    with pytest.raises(MismatchError, match="made for the SAE"):
        rollouts_of(told(tmp_path), loaded, replace(recipe, interventions=(foreign,)))
    with pytest.raises(MismatchError, match="is for the model"):
        rollouts_of(told(tmp_path), loaded, replace(recipe, model="another"))
    assert list(tmp_path.iterdir()) == []


def test_random_features_have_the_same_length(tmp_path, recipe) -> None:
    found: Any = rollouts_of(told(tmp_path, method="random"), load_model(MODEL, device="cpu"), recipe)
    for one, other in zip(recipe.interventions, found.interventions, strict=True):
        d = tiny.random_sae(one.layer).W_dec
        assert one.layer == other.layer
        assert one.feature != other.feature
        length = float(other.amount * d[:, other.feature].norm())
        assert length == pytest.approx(float(one.amount * d[:, one.feature].norm()), rel=1e-4)


def test_the_commands(tmp_path, recipe, capsys) -> None:
    recipe.save(tmp_path / "recipe.json")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    short = ["--model", str(MODEL), "--sae", str(SAE), "--max-new-tokens", "16", "--device", "cpu", "-n", "5"]
    sizes = ["--group", "2", "--prompts", "2", "--micro", "4", "--steps", "1", "--json"]
    asked = ["posttrain", "rl", str(prompts), "-o", str(tmp_path / "out"), *short, *sizes]
    assert main([*asked, "--recipe", str(tmp_path / "recipe.json"), "--held-out", str(prompts)]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert main([*asked, "--recipe", str(tmp_path / "none.json")]) == 2
    assert "there is no recipe" in capsys.readouterr().err

    looping = tmp_path / "looping.jsonl"
    looping.write_text("".join(json.dumps({"text": f"{word} " * 6}) + "\n" for word in ("hello", "Wo", "def", "is")))
    asked = ["posttrain", "repetition", str(prompts), "-o", str(tmp_path / "found.json"), *short]
    assert main([*asked, "--temperature", "1e-6", "--longest", "1", "--least", "16"]) == 2
    assert "answers loop; 5 texts" in capsys.readouterr().err
    assert not (tmp_path / "found.json").exists()
