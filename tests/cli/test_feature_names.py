"""A feature is named LAYER/FEATURE; the two options of before still work, with a note."""

from __future__ import annotations

import json

import pytest
import tiny

from qwen_scope.cli import main
from qwen_scope.cli.options import place_of
from qwen_scope.cli.spellings import respelled
from qwen_scope.errors import InputError, QwenScopeWarning
from qwen_scope.sae import feature_name, features_at, parse_feature

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]


@pytest.mark.parametrize("place", [(0, 0), (5, 678), (63, 131071)])
def test_a_name_reads_back(place: tuple[int, int]) -> None:
    assert parse_feature(feature_name(*place)) == place


@pytest.mark.parametrize("text", ["", "5", "5:678", "5/", "/678", "a/b", "-1/3", "5/678/9", "5/6.0", "٣/4"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(InputError, match="LAYER/FEATURE, such as 5/678"):
        parse_feature(text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("steer hi --layer 5 --feature 678 --amount 1", "steer hi --amount 1 --feature 5/678"),
        ("sweep p.txt --feature=678 --layer=5", "sweep p.txt --feature 5/678"),
        (
            "validate p.txt --feature 678 --target-feature 4:2 --layer 5",
            "validate p.txt --target-feature 4/2 --feature 5/678",
        ),
        ("label s --layer 5 -f 678 --summary", "label s --summary --features 5/678"),
        ("export s --to neuronpedia --layers=5 --features=3,40-50", "export s --to neuronpedia --features 5/3,5/40-50"),
        ("synthesize lab --features 3,7 --layer 5 -o x", "synthesize lab -o x --features 5/3,5/7"),
    ],
)
def test_the_old_spelling(given: str, expected: str) -> None:
    with pytest.warns(QwenScopeWarning, match=r"LAYER/FEATURE|is now --features? 5/"):
        assert respelled(given.split()) == expected.split()


@pytest.mark.parametrize(
    "words",
    [
        "steer hi --feature 5/678",
        "show 5/678",
        "store s --layer 5 --feature 678",
        "label s -n 3 --layer 5",
        "label s --features 5/3-9,2/7",
        "label s --features 678",
        "export s --to statistics --layers 0,2",
    ],
)
def test_what_stays(words: str) -> None:
    assert respelled(words.split()) == words.split()


def test_a_name_beside_a_layer() -> None:
    assert place_of(None, "5/678") == place_of(5, "5/678") == place_of(5, "678") == (5, 678)
    assert place_of(None, "678") == (None, 678)
    assert place_of(3, None) == (3, None)
    with pytest.raises(InputError, match="is of layer 5; leave --layer 4 out"):
        place_of(4, "5/678")


def test_lists_of_names() -> None:
    assert features_at("5/3-4,2/7", [2, 5]) == [(2, 7), (5, 3), (5, 4)]
    assert (
        features_at("7,3", [5]) == features_at("7,3", [2, 5], 5) == features_at("5/3,7", [2, 5], 5) == [(5, 3), (5, 7)]
    )
    with pytest.raises(InputError, match="there are layers 2, 5; name features LAYER/FEATURE, such as 2/7"):
        features_at("7", [2, 5])
    with pytest.raises(InputError, match="5/7 is not of layer 2"):
        features_at("5/7", [2, 5], 2)


def test_both_spellings_do_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--op", "ablate", "--max-new-tokens", "2", "--json", *WHERE]
    assert main(["steer", "hi", "--feature", "0/5", *rest]) == 0
    new = json.loads(capsys.readouterr().out)
    with pytest.warns(QwenScopeWarning):
        old = respelled(["steer", "hi", "--layer", "0", "--feature", "5", *rest])
    assert main(old) == 0
    assert json.loads(capsys.readouterr().out) == new
    assert new["interventions"][0]["feature"] == 5
