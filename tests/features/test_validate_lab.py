"""Verdicts on the lab's own German feature: causal on several seeds, not plainly so when it breaks the text."""

from __future__ import annotations

from collections import defaultdict

import lab_store
import numpy as np
import pytest

from qwen_scope.features import NOT_FLUENT, Examples, Rules, ValidateOptions, Verdict, validate
from qwen_scope.lab import LANGUAGES, documents, language_of_text, neutral_prompts
from qwen_scope.steer import Decoding, Intervention

pytestmark = pytest.mark.slow

GERMAN, UNRELATED = 678, 1100
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def examples() -> Examples:
    texts: dict[str, list[str]] = defaultdict(list)
    for one in documents(seed=5, n=1500):
        if one.language and one.kind == "talk":
            texts[one.language].append(one.text[:200])
    code = [one.text[:200] for one in documents(seed=6, n=1500) if one.kind == "code"]
    negative = [text for name in LANGUAGES if name != "de" for text in texts[name][:4]]
    return Examples(tuple(texts["de"][:20]), tuple(negative), tuple(code[:24]))


def verdict(examples: Examples, feature: int, amount: float, seed: int) -> Verdict:
    return validate(
        lab_store.scope(),
        [Intervention.add(layer=5, feature=feature, amount=amount, unit="resid_norm")],
        lambda made: np.array([float(language_of_text(text.split(END)[0]) == "de") for text in made]),
        [one.text for one in neutral_prompts(seed=100 + seed, n=24)],
        examples,
        ValidateOptions(n_random=9, n_shuffled=5, rules=Rules(fewest_random=9), seed=seed),
        decoding=Decoding(10, sample=True, temperature=0.7, top_k=0, top_p=1.0, seed=seed),
    )


@pytest.mark.parametrize("seed", [0])
def test_a_true_feature_is_causal_on_every_seed(examples: Examples, seed: int) -> None:
    found = verdict(examples, GERMAN, 0.5, seed)
    assert found.outcome == "causal", found.reasons
    assert found.evidence.over_shuffled.n == 5, "the interval is over the shuffles"


def test_an_amount_that_breaks_the_text_is_not_plainly_causal(examples: Examples) -> None:
    found = verdict(examples, GERMAN, 1.5, 0)
    assert found.evidence.gain.low > 0.5, "it turns German on"
    assert found.evidence.fluency.estimate > 10
    assert found.outcome == NOT_FLUENT


def test_an_unrelated_feature_is_not_causal(examples: Examples) -> None:
    assert verdict(examples, UNRELATED, 0.5, 0).outcome in ("no effect", "correlated only")
