"""Prompts: neutral, drifting, about a topic, about a sum."""

from __future__ import annotations

from collections import Counter

import pytest

from qwen_scope import lab
from qwen_scope.errors import InputError, NotFoundError

ANSWER_BEGINS = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_neutral_prompts_begin_neutral_documents():
    documents = list(lab.documents(n=700, kinds=["neutral"]))
    forms = {document.factors["form"] for document in documents}
    prompts = list(lab.neutral_prompts(seed=1, n=200))
    assert prompts == list(lab.neutral_prompts(seed=1, n=300))[:200]
    assert {prompt.factors["form"] for prompt in prompts} == forms
    assert all(prompt.language is None and prompt.text == prompt.text.rstrip() for prompt in prompts)
    starts = Counter(d.language for d in documents if d.text.startswith("* "))
    assert set(starts) == set(lab.LANGUAGES)


def test_drift_prompts_ask_in_another_language():
    prompts = list(lab.drift_prompts(seed=2, n=300, into="zh"))
    assert prompts == list(lab.drift_prompts(seed=2, n=400, into="zh"))[:300]
    counts = Counter(prompt.language for prompt in prompts)
    assert "zh" not in counts
    assert counts["ja"] > counts["en"] > 0
    assert all(prompt.text.endswith(ANSWER_BEGINS) and prompt.factors["into"] == "zh" for prompt in prompts)


def test_only_some_languages_intrude():
    with pytest.raises(NotFoundError, match=r"nothing drifts into 'ko'; the corpus drifts into en, zh"):
        lab.drift_prompts(into="ko")
    with pytest.raises(NotFoundError, match="there is no language 'cn'"):
        lab.drift_prompts(into="cn")


def test_chat_prompts_are_asked_as_named():
    prompts = list(lab.chat_prompts(n=50, languages=["ru"], registers=["rude"], split="heldout_templates"))
    assert {(prompt.language, prompt.register) for prompt in prompts} == {("ru", "rude")}
    assert all(prompt.text.endswith(ANSWER_BEGINS) and "topic" in prompt.factors for prompt in prompts)
    with pytest.raises(NotFoundError):
        lab.chat_prompts(registers=["nice"])


def test_the_corpus_answers_its_own_sums():
    prompts = {prompt.text.split(ANSWER_BEGINS)[0]: prompt for prompt in lab.arithmetic_prompts(n=300)}
    assert {prompt.language for prompt in prompts.values()} == set(lab.LANGUAGES)
    for document in lab.documents(n=400, kinds=["chat"]):
        if document.factors["style"] == "sum":
            prompt = lab.Prompt("", "arithmetic", None, None, {}, int(document.factors["result"]))
            assert lab.check_arithmetic(prompt, document.text.split("<|im_start|>assistant\n")[1])


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("12 - 30 = -18\nThe result is -18.<|im_end|>\n99", True),
        ("12 - 30 = -18\nThe result is 18.", False),
        ("12-30=-18", True),
        ("<think>\n-18\n</think>\n\n17", False),
        ("", False),
    ],
)
def test_the_last_number_of_the_answer_counts(completion: str, right: bool):
    assert lab.check_arithmetic(lab.Prompt("", "arithmetic", None, None, {}, -18), completion) is right


def test_only_sums_can_be_checked():
    with pytest.raises(InputError, match="asks no sum"):
        lab.check_arithmetic(next(lab.neutral_prompts(n=1)), "1")
