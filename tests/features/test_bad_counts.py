"""A count that cannot be right is refused where it enters: -3 is no wish to drop three, `True` is not 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import lab_store
import numpy as np
import pytest

from qwen_scope import Scope
from qwen_scope.analysis import data_efficiency, fit_rule, noise_test, shared_features
from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.features import (
    Budget,
    FindOptions,
    LabelOptions,
    Notes,
    cofiring,
    export_delphi,
    export_neuronpedia,
    feature_page,
    find_pooled,
    language_features,
    pool_texts,
    repeat_features,
    repeats_in_texts,
    similar,
    token_effects,
    top_logits,
)
from qwen_scope.lab import documents, neutral_prompts
from qwen_scope.scope import compare_seen
from qwen_scope.steer import Decoding
from qwen_scope.store import FeatureStore

LAYER = lab_store.LAYER
WRONG = [-3, 0, True, -(2**63)]


@pytest.fixture(scope="module")
def scope() -> Scope:
    return lab_store.scope()


def asked(scope: Scope, store: FeatureStore, seen, pooled, folder) -> dict[str, Callable[[int], object]]:
    """Everything that takes how many, by name."""
    return {
        "strongest": lambda n: seen.strongest(0, LAYER, n),
        "compare_seen": lambda n: compare_seen(seen, 1, n=n),
        "store.cofiring": lambda n: store.cofiring(LAYER, 3, n),
        "store.document_features": lambda n: store.document_features(0, LAYER, n),
        "store.documents_of": lambda n: store.documents_of(LAYER, 3, n),
        "store.contexts": lambda n: store.contexts(LAYER, 3, n),
        "contexts per document": lambda n: store.contexts(LAYER, 3, n, per_document=True),
        "strata": lambda n: store.contexts(LAYER, 3, 5, how="quantiles", strata=n),
        "store.silent": lambda n: store.silent(LAYER, 3, n),
        "store.histogram": lambda n: store.histogram(LAYER, 3, n),
        "similar": lambda n: similar(scope, LAYER, 3, n),
        "cofiring": lambda n: cofiring(store, LAYER, 3, n),
        "token_effects": lambda n: token_effects(scope, LAYER, 3, n),
        "top_logits": lambda n: top_logits(scope, [5], [LAYER], n),
        "find": lambda n: find_pooled(pooled, pooled, FindOptions(n=n)),
        "language_features": lambda n: language_features({"a": pooled, "b": pooled}, n),
        "search": lambda n: Notes(store).search("word", n),
        "page, n": lambda n: feature_page(LAYER, 3, store=store, n=n),
        "page, contexts": lambda n: feature_page(LAYER, 3, store=store, contexts=n),
        "page, bins": lambda n: feature_page(LAYER, 3, store=store, bins=n),
        "examples": lambda n: LabelOptions(examples=n),
        "tests": lambda n: LabelOptions(tests=n),
        "delphi, context": lambda n: export_delphi(store, folder / "d", context=n),
        "delphi, splits": lambda n: export_delphi(store, folder / "d", context=8, splits=n),
        "neuronpedia": lambda n: export_neuronpedia(
            store, LAYER, folder / "n", model_id="lab", set_name="s", contexts=n
        ),
        "max_new_tokens": lambda n: Decoding(max_new_tokens=n),
        "prefill_chunk": lambda n: Decoding(prefill_chunk=n),
    }


NAMES = list(asked(None, None, None, None, None))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def calls(scope, folder, tmp_path_factory) -> dict[str, Callable[[int], object]]:
    texts = ["Guten Morgen.", "The weather is fine today.", "Wo ist der Bahnhof?", "a + b", "It is late."]
    seen = scope.features(texts[:2], [LAYER])
    store = FeatureStore(folder)
    return asked(scope, store, seen, pool_texts(scope, texts, [LAYER]), tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_count_is_refused(calls, name: str, wrong: int) -> None:
    with pytest.raises(InputError, match=f"whole number of at least \\d.*; got {wrong}"):
        calls[name](wrong)


@pytest.mark.parametrize(("before", "after"), [(-1, 2), (2, -3), (True, 2)])
def test_tokens_around_a_place_are_counted(store: FeatureStore, before: int, after: int) -> None:
    for ask in (store.contexts, store.silent):
        with pytest.raises(InputError, match="must be a whole number of at least 0"):
            ask(LAYER, 3, 2, before=before, after=after)


@pytest.mark.parametrize("feature", [-1, -3, True, 10**6])
def test_features_to_export_are_of_the_store(store: FeatureStore, tmp_path, feature: int) -> None:
    """-1 was the last feature, as Python counts."""
    with pytest.raises((InputError, NotFoundError)):
        export_neuronpedia(store, LAYER, tmp_path / "n", model_id="lab", set_name="s", features=[feature])
    assert not (tmp_path / "n").exists()


def test_numbers_of_the_lab_and_of_rules() -> None:
    for ask in (neutral_prompts, documents):
        with pytest.raises(InputError, match="of at least 0; got -3"):
            ask(n=-3)
        assert list(ask(n=0)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample": True, "temperature": math.nan},
        {"sample": True, "temperature": math.inf},
        {"sample": True, "temperature": 0.0},
        {"sample": True, "temperature": True},
        {"sample": True, "top_p": math.nan},
        {"sample": True, "top_p": 1.5},
        {"sample": True, "top_k": -1},
        {"sample": True, "top_k": True},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": -1.0},
        {"seed": -1},
        {"seed": True},
        {"temperature": 0.5},
    ],
)
def test_a_decoding_of_wrong_values_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        Decoding(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"perplexity_ratio": math.nan}, {"perplexity_ratio": 0.9}, {"repetition": -0.1}, {"tolerance": math.inf}]
)
def test_a_budget_of_wrong_values_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} of a budget"):
        Budget(**wrong)


def test_repeats_and_shuffles(scope: Scope) -> None:
    changes = repeats_in_texts(scope, ["a b a b a b"] * 6, [LAYER])
    for wrong in (-3, 0, True):
        with pytest.raises(InputError, match="n must be a whole number of at least 1"):
            repeat_features(changes, wrong)
    with pytest.raises(InputError, match="false discovery rate"):
        repeat_features(changes, level=math.nan)


def test_counts_of_classifiers() -> None:
    from qwen_scope.analysis import Dataset, Labelled

    item = np.arange(8, dtype=np.int32)
    feature = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32)
    ones = np.ones(8, np.float32)
    data = Dataset("seeds", tuple("abcdefgh"), 2, 4, "f", item, feature, ones, item)
    seeds = Labelled({2: data}, feature == 0)
    for wrong in (-3, 0, True):
        for ask in (
            lambda n: fit_rule(seeds, n),
            lambda n: fit_rule(seeds, several=n),
            lambda n: noise_test(seeds, n),
            lambda n: data_efficiency(seeds, seeds, [2], repeats=n),
            lambda n: data_efficiency(seeds, seeds, [n]),
            lambda n: shared_features({"a": seeds}, 2, n),
        ):
            with pytest.raises(InputError, match=r"whole number (of at least|between) 1"):
                ask(wrong)
