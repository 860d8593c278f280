"""`steer` and `sweep` as they are typed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny

from qwen_scope.analysis import Rule, RuleFeature
from qwen_scope.cli import main
from qwen_scope.steer import Decoding, Intervention, Recipe, load_recipe


@pytest.fixture
def where() -> list[str]:
    return ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("The weather\nGuten Morgen\n\n")
    return str(path)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


STEER = ["--feature", "2/17", "--amount", "0.5", "--max-new-tokens", "6"]


def test_steer_shows_both_runs(capsys, where, scope) -> None:
    code, out, err = run(capsys, "steer", "Once", *where, *STEER, "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    one = Intervention.add(layer=2, feature=17, amount=0.5, unit="resid_norm")
    new = Decoding(max_new_tokens=6)
    assert data["steered"]["text"] == scope.generate("Once", [one], decoding=new).text
    assert data["unsteered"]["text"] == scope.generate("Once", decoding=new).text
    assert data["interventions"] == [one.to_json()]
    assert len(data["steered"]["tokens"][0]["candidates"]) == 10
    code, out, _ = run(capsys, "steer", "Once", *where, *STEER)
    assert code == 0
    assert "Unsteered" in out
    assert "Steered" in out


def test_steer_streams(capsys, where, scope) -> None:
    _, out, _ = run(capsys, "steer", "Once", *where, *STEER, "--stream")
    one = Intervention.add(layer=2, feature=17, amount=0.5, unit="resid_norm")
    assert out == scope.generate("Once", [one], decoding=Decoding(max_new_tokens=6)).text + "\n"


@pytest.mark.slow
def test_a_saved_recipe_applies_again(capsys, where, tmp_path) -> None:
    path = tmp_path / "calm.yaml"
    _, first, _ = run(capsys, "steer", "Once", *where, *STEER, "--save-recipe", str(path), "--json")
    assert load_recipe(path).name == "calm"
    code, again, _ = run(capsys, "steer", "Once", *where, "--recipe", str(path), "--max-new-tokens", "6", "--json")
    assert code == 0
    assert json.loads(again)["steered"] == json.loads(first)["steered"]


@pytest.mark.slow
def test_sweep_prints_and_plots(capsys, where, prompts, tmp_path) -> None:
    argv = ["sweep", prompts, *where, "--feature", "0/3", "--amounts", "0.2,0.4", "--max-new-tokens", "5"]
    figure = tmp_path / "sweep.png"
    code, out, _ = run(capsys, *argv, "--regex", "[aeiou]", "--plot", str(figure))
    assert code == 0
    assert "Dose and response" in out
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for target in (["--script", "LATIN"], ["--continuation", " hello"], ["--target-feature", "2/5"]):
        code, out, _ = run(capsys, *argv, *target, "--json")
        assert code == 0
        assert len(json.loads(out)["doses"]) >= 3


@pytest.mark.slow
def test_sweep_compares_recipes_and_saves_the_best(capsys, where, prompts, tmp_path, scope) -> None:
    paths = []
    for feature in (3, 5):
        path = tmp_path / f"f{feature}.json"
        one = Intervention.add(layer=0, feature=feature, amount=1.0, unit="resid_norm")
        Recipe.of(path.stem, scope.model, [one], scope.saes).save(path)
        paths += ["--recipe", str(path)]
    wide = ["--max-perplexity", "1e9", "--max-repetition", "1", "--tolerance", "0.01", "--max-new-tokens", "5"]
    known, kept = tmp_path / "known.txt", tmp_path / "kept.yaml"
    known.write_text("Guten Morgen\nThe weather is fine\n")
    argv = ["sweep", prompts, *where, *paths, "--amounts=-0.4,0.4", "--continuation", " hello", *wide]
    code, out, err = run(capsys, *argv, "--reference", str(known), "--save-recipe", str(kept), "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    best = data["candidates"][data["best"]]
    assert best["doses"][0]["perplexity"] != best["reference"]
    saved = load_recipe(kept)
    assert saved.interventions[0].amount == pytest.approx(best["proposed"])
    assert saved.interventions[0].feature == int(data["best"][1:])
    assert saved.effect["target"] > saved.effect["target_unsteered"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "Best: " in out


@pytest.mark.slow
def test_a_classifiers_rule_is_a_target(capsys, where, prompts, tmp_path, scope) -> None:
    parts = tuple(
        RuleFeature(layer, feature, 0.5, 1.0, 0.0, scope.saes[layer].identity.fingerprint)
        for layer, feature in ((0, 4), (2, 9))
    )
    path = tmp_path / "rule.json"
    Rule("tiny", parts).save(path)
    argv = ["sweep", prompts, *where, "--feature", "0/3", "--amounts", "0.4", "--max-new-tokens", "4"]
    code, out, err = run(capsys, *argv, "--rule", str(path), "--json")
    assert (code, err) == (0, "")
    texts = [one.text or " " for one in scope.generate(["The weather", "Guten Morgen"], decoding=Decoding(4))]
    seen = scope.features(texts, [0, 2])
    expected = [
        float(any(seen.of(i, p.layer).to_dense()[:, p.feature].max() > p.threshold for p in parts)) for i in (0, 1)
    ]
    assert json.loads(out)["doses"][0]["effect"]["estimate"] == sum(expected) / 2
    Rule("tiny", tuple(replace(part, weight=2.0) for part in parts), intercept=-1.0).save(path)
    code, out, _ = run(capsys, *argv, "--rule", str(path), "--json")
    assert code == 0
    sums = [sum(2 * float(seen.of(i, p.layer).to_dense()[:, p.feature].max()) for p in parts) - 1 for i in (0, 1)]
    assert json.loads(out)["doses"][0]["effect"]["estimate"] == sum(one > 0 for one in sums) / 2
    Rule("tiny", (replace(parts[0], sae="another"),)).save(path)
    code, _, err = run(capsys, *argv, "--rule", str(path))
    assert code == 2
    assert "is about the SAE another" in err


BAD = [
    (["steer", "x"], "--feature as LAYER/FEATURE"),
    (["steer", "x", "--feature", "7"], "LAYER/FEATURE"),
    (["steer", "x", "--feature", "0/1"], "needs an --amount"),
    (["steer", "x", "--feature", "0/96", "--amount", "1"], "feature 96 does not exist"),
    (["steer", "x", "--feature", "1/1", "--amount", "1"], "no SAE for layer 1"),
    (["steer", "x", "--feature", "0/1", "--amount", "nan"], "finite"),
    (["steer", "x", "--feature", "0/1", "--amount", "1e9"], "absurd"),
    (["steer", "x", "--feature", "0/1", "--amount", "1", "--unit", "miles"], "no unit 'miles'"),
    (["steer", "x", "--feature", "0/1", "--amount", "1", "--op", "boost"], "no op 'boost'"),
    (["steer", "x", "--feature", "0/1", "--amount", "1", "--where", "3-"], "is not a position"),
    (["steer", "x", "--feature", "0/1", "--op", "ablate", "--where", "60"], "exceed the context"),
    (["steer", "x", "--feature", "0/1", "--op", "ablate", "--amount", "1"], "has no amount"),
    (["steer", "x", "--recipe", "/nowhere.yaml"], "no recipe"),
    (["steer", "", "--feature", "0/1", "--op", "ablate"], "is empty"),
    (["steer", "x", "--feature", "0/1", "--op", "ablate", "--temperature", "1"], "no effect on greedy"),
    (["sweep", "/nowhere.txt", "--feature", "0/1", "--regex", "a"], "no file, folder or dataset"),
    (["sweep", "PROMPTS", "--feature", "0/1"], "name one target"),
    (["sweep", "PROMPTS", "--feature", "0/1", "--regex", "("], "not a regular expression"),
    (["sweep", "PROMPTS", "--feature", "0/1", "--regex", "a", "--amounts", "a"], "--amounts are"),
    (["sweep", "PROMPTS", "--feature", "0/1", "--target-feature", "2"], "LAYER/FEATURE"),
    (["sweep", "PROMPTS", "--feature", "0/1", "--rule", "/nowhere.json"], "no file"),
    (
        ["sweep", "PROMPTS", "--feature", "0/1", "--regex", "a", "--reference", "/no.txt"],
        "no file, folder or dataset",
    ),
    (["sweep", "PROMPTS", "--feature", "0/1", "--regex", "a", "--tolerance", "-1"], "budget"),
]


@pytest.mark.parametrize(("argv", "says"), BAD, ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else None)
def test_bad_input_ends_with_one_sentence_and_code_2(capsys, where, prompts, argv, says) -> None:
    code, _, err = run(capsys, *(prompts if part == "PROMPTS" else part for part in argv), *where)
    assert code == 2
    assert says in err
    assert err.startswith("qwen-scope: ")
    assert err.count("\n") == 1


def test_a_position_past_the_end(capsys, where) -> None:
    argv = ["steer", "x", *where, "--feature", "0/1", "--op", "ablate", "--max-new-tokens", "5"]
    code, _, err = run(capsys, *argv, "--where", "60")
    assert code == 2
    assert "position 60 is past the end" in err
