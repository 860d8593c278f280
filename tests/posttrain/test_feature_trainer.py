"""The auxiliary loss equals its restatement however a step is cut, and in every way TRL can train."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import posttrain_tiny as small
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.posttrain import FeatureLoss, SFTRun, TokenPenalty
from qwen_scope.train import DivergedError


@pytest.fixture(scope="module")
def wanted():
    """Loss, auxiliary loss and gradients of one step on all rows, restated."""
    policy, tokenizer = small.model()
    policy.train()
    cross, extra = small.restated(policy, small.tokenised(small.ROWS, tokenizer), [r["group"] for r in small.ROWS])
    (cross + small.WEIGHT * extra).backward()
    assert extra > 0.05, "the auxiliary loss has to matter in this test"
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    return (cross + small.WEIGHT * extra).item(), extra.item(), gradients


def check(trainer, wanted, tolerance: float = 1e-6) -> None:
    loss, extra, gradients = wanted
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, abs=10 * tolerance)  # rounded where it is logged
    assert log["feature_loss"] == pytest.approx(extra, abs=tolerance)
    (step,) = trainer.gradients
    assert step.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(step[name], gradient, atol=tolerance, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


WAYS = {
    "one padded batch": {},
    "four micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "one sample at a time": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 64},
}


@pytest.mark.filterwarnings("ignore:.*packing:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_restatement(way: str, wanted, tmp_path) -> None:
    check(small.train(tmp_path, **WAYS[way]), wanted)


CUTS = {
    "one sample at a time": ([[i] for i in range(8)], {"per_device_train_batch_size": 1}),
    "pairs": ([[0, 1], [2, 3], [4, 5], [6, 7]], {"per_device_train_batch_size": 2}),
    "a shorter last pass": ([[0, 1, 2], [3, 4, 5], [6, 7]], {"per_device_train_batch_size": 3}),
    "one pass": ([list(range(8))], {"per_device_train_batch_size": 8}),
}


@pytest.mark.parametrize("cut", CUTS)
def test_the_published_scale_is_that_of_the_published_code(cut: str, wanted, tmp_path) -> None:
    """Loss, log and gradients are the cross-entropy of the step plus lambda times the sum of the passes' means."""
    passes, more = CUTS[cut]
    policy, tokenizer = small.model()
    samples, groups = small.tokenised(small.ROWS, tokenizer), [row["group"] for row in small.ROWS]
    cross, _ = small.restated(policy, samples, groups)
    extra = small.published(policy, passes, samples, groups)
    (cross + small.WEIGHT * extra).backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    term = FeatureLoss(small.table(), small.saes(), weight=small.WEIGHT, scale="published")
    trainer = small.train(tmp_path, term, gradient_accumulation_steps=len(passes), **more)
    check(trainer, ((cross + small.WEIGHT * extra).item(), extra.item(), gradients), tolerance=2e-6)
    if len(passes) == 1:
        assert extra.item() == pytest.approx(wanted[1], rel=1e-6)  # one pass is the whole step: the scales are one
    else:
        assert extra.item() > 0.6 * len(passes) * wanted[1]


@pytest.mark.slow
def test_the_scales_differ_by_the_number_of_passes_of_equal_length(tmp_path) -> None:
    """The published batching, 32 passes of one sample each, is 31 to 32 times the mean of the step."""
    rows = [small.ROWS[0]] * 32
    ready = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32, "rows": rows}
    found = {}
    for scale in ("mean", "published"):
        term = FeatureLoss(small.table(), small.saes(), weight=small.WEIGHT, scale=scale)
        found[scale] = small.train(tmp_path, term, **ready).state.log_history[0]["feature_loss"]
    _, tokenizer = small.model()
    ((ids, start),) = small.tokenised(rows[:1], tokenizer)
    n = 3 * (len(ids) - start)  # tokens times features of one pass; the 1 that is added to it makes the difference
    assert found["published"] / found["mean"] == pytest.approx(32 * (n + 1 / 32) / (n + 1), rel=1e-5)


@pytest.mark.slow
def test_the_penalty_has_both_scales(tmp_path) -> None:
    policy, _ = small.model()
    found = {}
    for scale in ("mean", "published"):
        term = TokenPenalty(small.table(), policy, weight=0.3, scale=scale)
        ready = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "rows": [small.ROWS[1]] * 4}
        found[scale] = small.train(tmp_path, term, **ready).state.log_history[0]["token_penalty"]
    assert 3 < found["published"] / found["mean"] < 4


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), True])
def test_a_weight_that_is_no_number(weight) -> None:
    with pytest.raises(InputError, match="of at least 0"):
        FeatureLoss(small.table(), small.saes(), weight=weight)


def test_a_scale_that_does_not_exist(tmp_path) -> None:
    with pytest.raises(NotFoundError, match="mean, published"):
        FeatureLoss(small.table(), small.saes(), weight=1.0, scale="sum")
    with pytest.raises(NotFoundError, match="mean, published"):
        SFTRun("lab", tmp_path, lambda_scale="Published")


@pytest.mark.slow
def test_variants_equal_the_restatement(tmp_path) -> None:
    """A threshold of zero, and enhancement, which acts on the target's samples alone."""
    for variant in ({"zero": True}, {"enhance": True}):
        policy, tokenizer = small.model()
        samples = small.tokenised(small.ROWS, tokenizer)
        cross, extra = small.restated(policy, samples, [r["group"] for r in small.ROWS], **variant)
        (cross + small.WEIGHT * extra).backward()
        assert extra.item() > 0.001
        gradients = {name: p.grad for name, p in policy.named_parameters()}
        term = FeatureLoss(small.table(), small.saes(), weight=small.WEIGHT, **variant)
        check(small.train(tmp_path, term), ((cross + small.WEIGHT * extra).item(), extra.item(), gradients))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_lora_trains_only_its_adapters(wanted, tmp_path) -> None:
    """B of an adapter starts at zero, so the loss is that of the bare model; gradients reach B through the features."""
    lora = LoraConfig(r=2, target_modules="all-linear")
    trainer = small.train(tmp_path, peft=lora)
    assert trainer.state.log_history[0]["feature_loss"] == pytest.approx(wanted[1], abs=1e-6)
    (with_term,) = trainer.gradients
    (plain,) = small.train(tmp_path, None, peft=lora, rows=plain_rows()).gradients
    assert with_term.keys() == plain.keys()
    assert all("lora_" in name for name in with_term)
    assert any((with_term[name] - plain[name]).abs().max() > 1e-4 for name in plain)


def plain_rows() -> list[dict]:
    return [{key: row[key] for key in ("prompt", "completion")} for row in small.ROWS]


def test_bf16_keeps_the_term_in_fp32(wanted, tmp_path) -> None:
    trainer = small.train(tmp_path, bf16=True)
    assert trainer.state.log_history[0]["feature_loss"] == pytest.approx(wanted[1], rel=0.02)
    assert all(g.isfinite().all() for g in trainer.gradients[0].values())


def test_plain_is_trl_alone(tmp_path) -> None:
    """Without a term the trainer takes data without groups and logs nothing of ours."""
    trainer = small.train(tmp_path, None, rows=plain_rows())
    assert "feature_loss" not in trainer.state.log_history[0]


def test_evaluation_reports_the_cross_entropy_alone(tmp_path) -> None:
    trainer = small.train(tmp_path, learning_rate=1e-12)
    rows = Dataset.from_list(small.ROWS)
    plain = small.train(tmp_path, None, rows=plain_rows(), learning_rate=1e-12)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(plain.evaluate(rows)["eval_loss"], abs=1e-6)


def test_penalty_equals_its_restatement(tmp_path) -> None:
    policy, tokenizer = small.model()
    samples = small.tokenised(small.ROWS, tokenizer)
    n = sum(len(ids) - start for ids, start in samples)
    total = 0.0
    for (ids, start), row in zip(samples, small.ROWS, strict=True):
        if row["group"] in ("en", "de"):
            p = policy(torch.tensor([ids]), use_cache=False).logits[0].double().softmax(-1)
            total += sum(p[t - 1, token].item() for t in range(start, len(ids)) for token in small.table().tokens)
    trainer = small.train(tmp_path, TokenPenalty(small.table(), policy, weight=0.3), per_device_train_batch_size=3)
    assert trainer.state.log_history[0]["token_penalty"] > 0
    whole = small.train(tmp_path, TokenPenalty(small.table(), policy, weight=0.3))
    assert whole.state.log_history[0]["token_penalty"] == pytest.approx(total / (n + 1), abs=1e-6)


def test_samples_without_a_response_or_a_group_add_nothing(tmp_path) -> None:
    """A micro-batch of them alone has no loss, not NaN; the step is that of the other rows."""
    _, tokenizer = small.model()
    rows = []
    for (ids, start), row in zip(small.tokenised(small.ROWS[:4], tokenizer), small.ROWS, strict=False):
        index = ("de", "en", "zh").index(row["group"])
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:], "groups": [index] * len(ids)})
    empty = {
        "input_ids": rows[0]["input_ids"],
        "labels": [-100] * len(rows[0]["input_ids"]),
        "groups": rows[0]["groups"],
    }
    ready = {"dataset_kwargs": {"skip_prepare_dataset": True}, "per_device_train_batch_size": 1}
    with_empty = small.train(tmp_path, rows=Dataset.from_list([*rows, empty]), gradient_accumulation_steps=5, **ready)
    without = small.train(tmp_path, rows=Dataset.from_list(rows), gradient_accumulation_steps=4, **ready)
    for name, gradient in without.gradients[0].items():
        torch.testing.assert_close(with_empty.gradients[0][name], gradient, atol=1e-7, rtol=1e-5)
    nothing = small.train(tmp_path, rows=Dataset.from_list([empty]), gradient_accumulation_steps=1, **ready)
    assert all(not g.any() for g in nothing.gradients[0].values())


def test_only_the_needed_rows_are_kept() -> None:
    term = FeatureLoss(small.table(), small.saes(), weight=1.0)
    d_model, features, groups, layers = 32, 3, 3, 2
    assert term.nbytes == layers * (features * d_model + features + groups * features) * 4


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="no column 'group'"):
        small.train(tmp_path, rows=plain_rows())
    with pytest.raises(NotFoundError, match="a group 'fr' that the alpha table lacks"):
        small.train(tmp_path, rows=[{**small.ROWS[0], "group": "fr"}])
    policy, _ = small.model()
    frozen = TokenPenalty(small.table(), policy, weight=1.0)
    with pytest.raises(InputError, match=r"no gradient reaches the residual at layers\.2"):
        small.train(tmp_path, frozen, only="lm_head")
    with pytest.raises(DivergedError, match="not a finite number at step"):
        small.train(tmp_path, learning_rate=1e30, max_steps=4)
    with pytest.raises(InputError, match="of at least 0"):
        FeatureLoss(small.table(), small.saes(), weight=-1.0)
    with pytest.raises(InputError, match="threshold of zero"):
        FeatureLoss(small.table(), small.saes(), weight=1.0, zero=True, enhance=True)
    with pytest.raises(NotFoundError, match="no features at layer 1"):
        FeatureLoss(small.table(), small.saes(), weight=1.0, layers=[1])


@pytest.mark.slow
def test_two_processes(wanted, tmp_path) -> None:
    """Half the rows on each of two processes give the same loss and gradients as all rows in one."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    here = Path(__file__)
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join(map(str, [here.parents[2] / "src", here.parents[1], here.parent])),
    }
    runs = [
        subprocess.Popen(
            [sys.executable, str(here.with_name("two_processes.py")), str(tmp_path)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for run in runs:
        said = run.communicate(timeout=280)[1]
        assert run.returncode == 0, said[-3000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in wanted[2].items():
            torch.testing.assert_close(found["gradients"][name], gradient, atol=1e-6, rtol=1e-5)
    policy, tokenizer = small.model()
    samples, groups = small.tokenised(small.ROWS, tokenizer), [row["group"] for row in small.ROWS]
    halves = small.published(policy, [[0, 1, 2, 3], [4, 5, 6, 7]], samples, groups).item() / 2
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["log"]["loss"] == pytest.approx(wanted[0], abs=1e-5)
        assert found["log"]["feature_loss"] == pytest.approx(wanted[1], abs=1e-6), "the term of both processes"
        assert found["published"]["feature_loss"] == pytest.approx(halves, abs=1e-6)
