"""The loop detector equals its definition by brute force; shares count what it finds; rewards are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import load_model
from qwen_scope.posttrain import Detector, Sampling, loop_share, reward_of
from qwen_scope.posttrain.rewards import consistency


def brute(ids: list[int], longest: int, times: int, least: int) -> tuple[int, int] | None:
    """Start and period by the definition: every block length, every start, token by token."""
    for n in range(1, longest + 1):
        for start in range(len(ids)):
            end = len(ids) - start
            if end < times * n or end < least:
                break
            if all(ids[i] == ids[i - n] for i in range(start + n, len(ids))):
                return start, n
    return None


def test_the_detector_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        head = rng.integers(0, 3, rng.integers(0, 8)).tolist()
        block = rng.integers(0, 3, rng.integers(1, 7)).tolist()
        ids = head + (block * int(rng.integers(1, 7)))[: int(rng.integers(1, 30))]
        rules = Detector(longest=int(rng.integers(1, 8)), times=int(rng.integers(2, 5)), least=int(rng.integers(1, 9)))
        loop = rules.find(ids)
        expected = brute(ids, rules.longest, rules.times, rules.least)
        assert (None if loop is None else (loop.start, loop.period)) == expected
        if loop is not None:
            assert loop.turns == pytest.approx((len(ids) - loop.start) / loop.period)
            found += 1
    assert 50 < found < 350


def test_what_is_no_loop() -> None:
    rules = Detector(longest=4, times=3, least=6)
    assert rules.find([]) is None
    assert rules.find([1] * 5) is None  # too short
    assert rules.find([1] * 6) is not None
    assert rules.find([1, 2, 3] * 3 + [9]) is None  # it ends
    assert rules.find([1, 2, 3, 4, 5] * 5) is None  # the block is longer than what is looked for
    for wrong in ({"longest": 0}, {"times": 1}, {"least": 0}):
        with pytest.raises(InputError, match="a loop is a block"):
            Detector(**wrong)


def test_shares_of_a_model_that_loops() -> None:
    loaded = load_model(tiny.folder() / "model", device="cpu")
    cold = Sampling(24, temperature=1e-3, detector=Detector(4, 3, 9))
    prompts = ["hello ", "Wo ist der ", "def "]
    found = loop_share(loaded.model, loaded.tokenizer, prompts, cold, samples=2)
    assert [one.prompt for one in found.answers] == [0, 0, 1, 1, 2, 2]
    for one in found.answers:
        expected = None if one.finished else brute(list(one.ids), 4, 3, 9)
        assert (None if one.loop is None else (one.loop.start, one.loop.period)) == expected
    share = np.mean([one.loop is not None for one in found.answers])
    assert found.share.estimate == pytest.approx(share)
    assert found.per_prompt().mean() == pytest.approx(share)
    with pytest.raises(InputError, match="at least two prompts"):
        loop_share(loaded.model, loaded.tokenizer, prompts[:1], cold)
    with pytest.raises(InputError, match="can't hold a loop"):
        Sampling(8)


def test_rewards() -> None:
    end, on = [5, 1], [5, 6]
    answer = reward_of("answer", [1])
    asked = {"prompts": ["q"] * 5, "answer": ["12", "12", "12", "yes", "no"]}
    texts = ["It is 1,012 - no, 12.", "12", "12 or 13", "Yes, indeed", "yes"]
    assert answer(completions=texts, completion_ids=[end, on, end, end, end], **asked) == [1, 0, 0, 1, 0]
    known = reward_of("lab", [1])
    prompts = {"prompts": ["q"] * 4, "language": ["en", "en", "de", "ru"], "expected": [6, None, None, None]}
    texts = ["2 + 4 = 6", "The dog is in the garden.", "The dog is in the garden.", "Собака в саду."]
    assert known(completions=texts, completion_ids=[end, end, end, on], **prompts) == [1, 1, 0, 0]
    with pytest.raises(NotFoundError, match="no reward"):
        reward_of("beauty", [1])
    with pytest.raises(NotFoundError, match="no reward"):
        reward_of("json:beauty", [1])


def test_language_consistency() -> None:
    wrap = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert consistency(wrap.format("Где собака?"), "Она в саду, 12!") == 1.0
    assert consistency(wrap.format("Где собака?"), "дом dog") == pytest.approx(0.5)
    assert consistency(wrap.format("これは何ですか"), "犬とカメラ") == 1.0
    assert consistency(wrap.format("狗在哪里"), "犬とカメラ") == pytest.approx(1 / 5)
    assert consistency(wrap.format("Where?"), "12 + 3.") == 0.0
    scored = reward_of("language", [1])(prompts=["a", "б"], completions=["b", "b"], completion_ids=[[1], [1]])
    assert scored == [1.0, 0.0]
