"""Labels that rules write: what they say of made contexts, that the same words are tested, and when they can't say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lab_store
import numpy as np
import pytest
from lab_store import LAYER

from qwen_scope import FeatureStore
from qwen_scope.features import (
    Label,
    LabelOptions,
    Material,
    Note,
    Notes,
    RuleJudge,
    label_features,
    make_label,
    material,
    random_detection,
    scored_label,
    with_random,
)
from qwen_scope.features.rule_judge import best_wording
from qwen_scope.features.wording import KINDS, fits, language_of
from qwen_scope.stats import Interval
from qwen_scope.store import Context

ENGLISH = ["the cat is on the mat and it was not for you", "we have 12 apples , and you have 7 of them",
           "what is this that they want from the old man ?", "it is not but a word that you know and have"]  # fmt: skip
GERMAN = ["das ist nicht die Katze und ich bin auch hier", "wir sind 9 Leute , und der Hund ist auf dem Dach",
          "ich und die Frau für das Haus mit dem Dach", "sie ist nicht hier und es ist auch zu spät"]  # fmt: skip
CHINESE = ["今天 天气 很 好 我们 去 公园", "你 喜欢 吃 什么 东西 呢", "他 昨天 没有 来 上课"]


def context(text: str, fires: Sequence[str] | None = None, document: int = 0) -> Context:
    """Words as tokens, those named firing; None for all, () for none."""
    words = text.split(" ")
    tokens = tuple(word if i == 0 else f" {word}" for i, word in enumerate(words))
    values = tuple(1.0 if fires is None or word in fires else 0.0 for word in words)
    return Context(document, 0, max(values), 0, tokens, values)


def wording(fires: Sequence[str] | None, where: Sequence[str], elsewhere: Sequence[str]) -> str:
    return best_wording([context(text, fires) for text in where], [context(text, ()) for text in elsewhere])


def test_what_is_said_of_made_contexts() -> None:
    assert wording(None, GERMAN, ENGLISH + CHINESE) == "German text"
    assert wording(None, CHINESE, ENGLISH + GERMAN) in ("Chinese text", "Chinese letters")
    with_numbers = [ENGLISH[1], GERMAN[1], "take 4 of those", "nur 33 Tage"]
    numbers = wording(["12", "7", "9", "4", "33"], with_numbers, [ENGLISH[0], *ENGLISH[2:], *GERMAN[2:]])
    assert numbers == "numbers"
    listed = wording(["und"], GERMAN, ENGLISH + CHINESE)
    assert listed == '" und"', "the word, not its language"
    ends = wording(["?"], [ENGLISH[2], "who is it ?", "why not ?", "are you here ?"], [ENGLISH[0], *GERMAN])
    assert ends in ("question marks", "the end of a sentence")
    behind = [f"one {x} went" for x in ("king", "dog", "bird", "tree", "house", "cloud")]
    assert wording([x.split()[1] for x in behind], behind, [*GERMAN, *ENGLISH]) == 'after "one"'


def test_a_feature_without_a_pattern_is_not_named() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghij"), 12)) for _ in range(40)]
    made = [replace(context(text, ()), values=tuple(float(x) for x in rng.random(12) < 0.2)) for text in texts]
    silent = [context(text, ()) for text in texts[20:]]
    assert best_wording(made[:20], silent) == ""
    said = RuleJudge().name(Material(0, 0, tuple(made[:20]), (), (), (), tuple(silent)))
    assert said.startswith("unclear; typical tokens: ")
    assert any(fits(said, made[0].tokens)) or any(fits(said, made[1].tokens)), "and is tested by its tokens"


@pytest.mark.parametrize(
    ("label", "text", "expected"),
    [
        ("numbers", "take 12 of 7", [1, 3]),
        ("German text", GERMAN[0], list(range(10))),
        ("German text", ENGLISH[0], []),
        ("commas in German text", GERMAN[1], [4]),
        ("commas in German text", ENGLISH[1], []),
        ('" und", " der"', GERMAN[1], [5, 6]),
        ('after " und"', GERMAN[1], [6]),
        ('" und"; makes likely " der"', GERMAN[1], [5]),
        ("the colour of the sky", GERMAN[1], []),
        ('"a", 7', "a 7", []),
    ],
)
def test_a_label_is_tested_by_its_words(label: str, text: str, expected: list[int]) -> None:
    tokens = context(text).tokens
    assert [i for i, one in enumerate(fits(label, tokens)) if one] == expected


def test_every_kind_fits_something_and_not_everything() -> None:
    signs = "the 12 Word CAPS , . ? ! : ( + def x <|im_end|> � the ing は 我 한 д ع λ א क ก"
    texts = ["\n", "\n\n", '"', *signs.split()]
    tokens = ["a", *texts]
    for name, test in KINDS.items():
        found = test(tokens)
        assert len(found) == len(tokens), name
        assert not all(found), name
    assert all(any(test(["a.", "\nx", "b", "c d", *tokens, "b", "c"])) for test in KINDS.values())


def test_languages_are_told_by_letters_and_common_words() -> None:
    assert [language_of(one) for one in (ENGLISH[0], GERMAN[0], CHINESE[0])] == ["English", "German", "Chinese"]
    assert language_of("これは日本語の文です") == "Japanese"
    assert language_of("Это не так, как вы думаете") == "Cyrillic"
    assert language_of("le chat est sur la table et il dort") == "French"
    assert (
        language_of("La paz de la región, en el árbol de la ciudad de París") == "Spanish"
    )  # "la" and "de" tell nothing
    assert language_of("A estrutura da cidade é grande e não tem muitas casas") == "Portuguese"
    assert language_of("xyz qqq") == ""
    assert language_of("abschch-büjöchbüjöjöjöhjöjöjöjöjöchutzbüjöjöjöjöjöjöjöjöjöjöjöjöjöjö") == ""  # as a model wrote
    assert language_of("12 + 7 = 19") == ""


@pytest.fixture
def store(tmp_path: Path):
    with FeatureStore(lab_store.copied(tmp_path)) as opened:
        yield opened


def test_labels_of_the_lab_are_made_and_tested_on_different_documents(store: FeatureStore) -> None:
    documents = store.stats(LAYER)["documents"].to_numpy()
    busy = np.argsort(np.abs(documents - store.manifest.documents // 3), kind="stable")[:40].tolist()
    given = material(store, LAYER, busy[0], LabelOptions(examples=8, tests=6))
    tested = {one.document for one in (*given.firing, *given.silent)}
    assert not tested & {one.document for one in given.contrast}
    assert all(max(one.values) == 0 for one in given.contrast)
    found = label_features(store, [(LAYER, f) for f in busy], RuleJudge(), LabelOptions(examples=8, tests=6))
    labels = {place: one for place, one in found.items() if isinstance(one, Label)}
    assert labels
    assert all(one.source == "summary" and one.scorer == "rules" for one in labels.values())
    assert Notes(store).labels() == labels
    own, others = [], []
    for place, one in labels.items():
        test = material(store, *place, LabelOptions(examples=8, tests=6))
        own.append(one.detection.estimate)
        others += [scored_label(test, RuleJudge(), other.text).detection.estimate
                   for at, other in labels.items() if at != place]  # fmt: skip
    assert np.mean(own) > np.mean(others) + 0.05


def test_labels_of_other_features_are_the_control(store: FeatureStore) -> None:
    documents = store.stats(LAYER)["documents"].to_numpy()
    busy = np.argsort(np.abs(documents - store.manifest.documents // 3), kind="stable")[:14].tolist()
    asked = LabelOptions(examples=8, tests=6)
    found = label_features(store, [(LAYER, f) for f in busy], RuleJudge(), asked)
    labels = {place: one for place, one in found.items() if isinstance(one, Label)}
    place = next(iter(labels))
    few = dict(list(labels.items())[:2])
    assert with_random(store, few, RuleJudge(), asked) == few, "too few others to stand for random labels"
    told = with_random(store, labels, RuleJudge(), asked, n=3)[place]
    assert told.random is not None
    given = material(store, *place, asked)
    said = ["German text", "numbers"]
    answers = [
        [any(fits(one, context.tokens)) == fires for context in side]
        for fires, side in ((True, given.firing), (False, given.silent))
        for one in said
    ]
    n = len(given.firing)
    expected = (np.mean(answers[:2]) + np.mean(answers[2:])) / 2
    assert n == len(answers[0])
    assert random_detection(given, RuleJudge(), said).estimate == pytest.approx(expected)
    sure = replace(told, detection=Interval(0.8, 0.7, 0.9, 6), random=Interval(0.5, 0.45, 0.55, 6))
    assert not sure.at_chance
    assert replace(sure, random=Interval(0.65, 0.6, 0.75, 6)).at_chance
    entry = make_label(*place, store.layer(LAYER).fingerprint, sure)
    assert Note.from_json(entry.to_json()).label == sure


def test_words_of_a_lens_stand_in_the_label_and_change_no_score(store: FeatureStore) -> None:
    documents = store.stats(LAYER)["documents"].to_numpy()
    feature = int(np.argmin(np.abs(documents - store.manifest.documents // 3)))
    asked = LabelOptions(examples=8, tests=6)
    seen: list[Material] = []

    class Watched:
        source, scorer, concurrency = "summary", "rules", 1

        def __init__(self) -> None:
            self.own = RuleJudge()

        def explain(self, examples):
            return self.own.explain(examples)

        def name(self, given: Material) -> str:
            seen.append(given)
            return self.own.name(given)

        def detect(self, label, texts):
            return self.own.detect(label, texts)

        def fuzz(self, label, marked):
            return self.own.fuzz(label, marked)

    plain = label_features(store, [(LAYER, feature)], RuleJudge(), asked)[LAYER, feature]
    told = label_features(
        store, [(LAYER, feature)], Watched(), asked, again=True, promotes=lambda *_: (" der", " die")
    )[LAYER, feature]
    assert isinstance(plain, Label)
    assert isinstance(told, Label)
    assert seen[0].promotes == (" der", " die")
    assert told.text == plain.text + '; makes likely " der", " die"'
    assert (told.detection, told.fuzzing) == (plain.detection, plain.fuzzing)
