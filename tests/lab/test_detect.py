"""The language of a text, by script and by the lab's own words."""

from __future__ import annotations

import pytest

from qwen_scope import lab


def test_sentences_of_the_lab_are_told_apart():
    right = total = 0
    for split in lab.SPLITS:
        for document in lab.documents(split, seed=4, n=120, kinds=["talk"]):
            for span in document.spans:
                total += 1
                right += lab.language_of_text(document.text[span.start : span.end]) == document.language
    assert total > 2_000
    # 99% is promised; more is usual.
    assert right / total >= 0.99


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", None),
        ("12:30 + 7 🙂", None),
        ("市場は秋に閉まる", "ja"),
        ("市场秋天不开门", "zh"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None),
        ("<|im_start|>user\nمرحبا<|im_end|>", "ar"),
        ("the dog eats bread", "en"),
        ("zzz qqq", None),
    ],
)
def test_odd_texts(text: str, language: str | None):
    assert lab.language_of_text(text) == language
