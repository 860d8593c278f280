"""Every file of ours is read with exact types: each leaf of each format, replaced by what only looks like it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_scope.analysis import Dataset, Rule, RuleFeature, Student
from qwen_scope.errors import MismatchError, QwenScopeError
from qwen_scope.features import Label, Note
from qwen_scope.posttrain import AlphaTable, LayerTable, read_table
from qwen_scope.sae import Identity
from qwen_scope.stats import Interval
from qwen_scope.steer import Intervention, Recipe, load_recipe
from qwen_scope.store import LayerInfo
from qwen_scope.store.layout import Manifest, Part

SAE = Identity("group", 2, "f" * 64)
RULE = Rule("rude", (RuleFeature(2, 7, 0.5, 2.0, 0.25, SAE.fingerprint),), {"seeds": 20})
LABEL = Label("greetings", Interval(0.9, 0.8, 1.0, 20), Interval(0.8, 0.7, 0.9, 20), "model", "model")
RECIPE = Recipe(
    "german",
    "qwen3, 6 layers of 64",
    (
        Intervention.add(layer=2, feature=7, amount=0.5, unit="resid_norm", sae=SAE),
        Intervention.add(layer=2, direction=[0.5, 1.5], amount=1.5),
    ),
    "group",
)
TABLE = AlphaTable("zh", (LayerTable(2, SAE, (3, 5), (0.5, 0.25), {"zh": (1.5, 0.5), "en": (0.5, 0.1)}),), (9, 12))
MANIFEST = Manifest(
    "model",
    {"row_tokens": 10},
    {2: LayerInfo(2, "layers.2.resid_post", "group", "f" * 64, 24, 4, "topk", 50, 50)},
    5,
    50,
    {"empty": 1},
    (Part("tokens/000000.parquet", 50, 100, "a" * 64),),
    {"qwen-scope": "0.1"},
)
FREE = {"about", "effect", "made", "request", "versions", "provenance", "author"}
"""Keys whose content is said to be free, or a text that may be empty."""


def loaded_from(read: Callable[[Path], Any]) -> Callable[[Any, Path], Any]:
    def load(data: Any, folder: Path) -> Any:
        path = folder / "file.json"
        path.write_text(json.dumps(data))
        return read(path)

    return load


def saved(write: Callable[[Path], Any], folder: Path) -> Any:
    write(folder / "saved.json")
    return json.loads((folder / "saved.json").read_text())


STUDENT = Student(("ab", "cd"), np.array([1.5, 2.5]), np.array([0.5, -0.5]), 0.25, {"documents": 3})
KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Path], Any]]] = {
    "rule": (lambda f: saved(RULE.save, f), loaded_from(Rule.load)),
    "student": (lambda f: saved(STUDENT.save, f), loaded_from(Student.load)),
    "recipe": (lambda f: saved(RECIPE.save, f), loaded_from(load_recipe)),
    "alpha table": (lambda f: saved(TABLE.save, f), loaded_from(read_table)),
    "manifest": (
        lambda f: json.loads(MANIFEST.to_json()),
        lambda data, f: Manifest.from_json(json.dumps(data)),
    ),
    "label": (
        lambda f: asdict(Note("label", 2, 7, SAE.fingerprint, asdict(LABEL))),
        lambda data, f: Note.from_json(data),
    ),
    "note": (
        lambda f: asdict(Note("note", 2, 7, SAE.fingerprint, {"text": "see"})),
        lambda data, f: Note.from_json(data),
    ),
    "verdict": (
        lambda f: asdict(Note("verdict", 2, 7, SAE.fingerprint, {"outcome": "causal"})),
        lambda data, f: Note.from_json(data),
    ),
}


def leaves(data: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every value of a file that a format speaks of, with the way to it; lists and objects too."""
    if path:
        yield path, data
    if path and path[-1] in FREE:
        return
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield from leaves(value, (*path, key))


def wrong_for(value: Any) -> list[Any]:
    """What no reader may take for a value of this kind."""
    if isinstance(value, str):
        return [3, True, ["x"], {}]
    if isinstance(value, dict):
        return [[], "x", 1, None, True]
    if isinstance(value, list):
        return [{}, "x", 1, None, True]
    if isinstance(value, int):
        return [True, False, value + 0.9, float(value), str(value), [value], -1, math.nan, 2**70]
    return [True, math.nan, math.inf, -math.inf, str(value), [value], {}]


def changed(data: Any, path: tuple, value: Any) -> Any:
    out = copy.deepcopy(data)
    at = out
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_leaf_takes_what_only_looks_like_its_kind(kind: str, tmp_path: Path) -> None:
    make, load = KINDS[kind]
    data = make(tmp_path)
    load(data, tmp_path)
    taken, tried = [], 0
    for path, value in leaves(data):
        if path[-1] in FREE and not isinstance(value, dict):
            continue
        for wrong in wrong_for(value):
            if path[-1] == "sae" and kind == "recipe" and wrong is None:
                continue  # an intervention may leave open which SAE
            tried += 1
            try:
                load(changed(data, path, wrong), tmp_path)
            except QwenScopeError as error:
                assert len(str(error)) < 400 + len(str(tmp_path))  # noqa: PT017
            else:
                taken.append((path, wrong))
    assert not taken
    assert tried > 25


@pytest.mark.parametrize("kind", KINDS)
def test_no_key_may_be_missing_or_unknown(kind: str, tmp_path: Path) -> None:
    make, load = KINDS[kind]
    data = make(tmp_path)
    with pytest.raises(QwenScopeError):
        load({**data, "treshold": 1}, tmp_path)
    for key in set(data) - {"id"}:
        with pytest.raises(QwenScopeError):
            load({name: value for name, value in data.items() if name != key}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "path", "wrong", "says"),
    [
        ("alpha table", ("layers", 0, "layer"), 5.9, "'layer' of a layer of the alpha table .* got 5.9"),
        ("alpha table", ("layers", 0, "features", 0), 0.5, "'features' .* whole number.* got 0.5"),
        ("alpha table", ("layers", 0, "scores", 1), math.nan, "'scores' .* finite number; got nan"),
        ("alpha table", ("layers", 0, "sae", "layer"), 3, "layer 2 .* has the SAE of layer 3"),
        ("alpha table", ("layers", 0, "features", 1), 3, "names a feature twice"),
        ("alpha table", ("version",), True, "of version True; this package reads version 1"),
        ("rule", ("version",), True, "of version True"),
        ("rule", ("features", 0, "threshold"), -0.5, "'threshold' .* of at least 0; got -0.5"),
        ("rule", ("features", 0, "scale"), 0.0, "'scale' .* above 0"),
        ("rule", ("features", 0, "delta"), 1.5, "'delta' .* between -1 and 1; got 1.5"),
        ("student", ("vocabulary", 1), "ab", "each once"),
        ("student", ("idf",), [1.5], "one finite idf and weight"),
        ("recipe", ("version",), 1.0, "of version 1.0"),
        ("manifest", ("version",), 1.0, "of version 1.0"),
        ("label", ("body", "detection", "low"), 1.5, "'low' of detection of a label .* between 0 and 1"),
        ("label", ("body", "detection", "n"), 5.5, "'n' of detection of a label must be a whole number"),
        ("label", ("body", "fuzzing", "high"), 0.1, "ends below its beginning"),
        ("verdict", ("body", "outcome"), None, "'outcome' of a verdict is a text, not None"),
    ],
)
def test_the_sentence_names_the_key_and_what_fits(kind: str, path: tuple, wrong: Any, says: str, tmp_path) -> None:
    make, load = KINDS[kind]
    with pytest.raises(QwenScopeError, match=says):
        load(changed(make(tmp_path), path, wrong), tmp_path)


@pytest.mark.parametrize("feature", [24, 999_999, 2**31])
def test_a_rule_about_a_feature_that_the_sae_lacks_is_refused_where_they_meet(feature: int) -> None:
    """Before, it was silently false on every document."""
    none = np.zeros(0, np.int32)
    data = Dataset("texts", ("a", "b"), 2, 24, SAE.fingerprint, none, none, none.astype(np.float32), none)
    rule = Rule("rude", (RuleFeature(2, feature, 0.5, 2.0, 0.25, SAE.fingerprint),))
    for ask in (rule.values, rule.decide, rule.scores, lambda layers: rule.calibrated(layers, 0.1)):
        with pytest.raises(MismatchError, match=f"names feature {feature} of layer 2, whose SAE has features 0 to 23"):
            ask({2: data})
    assert not RULE.decide({2: data}).any(), "a feature that exists may well be silent"
