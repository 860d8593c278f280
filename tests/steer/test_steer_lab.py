"""The commands on the bundled lab, as the README types them: German is turned on, found, and judged."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from qwen_scope.cli import main
from qwen_scope.lab import documents, language_of_text, neutral_prompts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def german() -> list[str]:
    """Layer and feature of the card's German detector."""
    metrics = json.loads((files("qwen_scope") / "assets" / "lab" / "metrics.json").read_text(encoding="utf-8"))
    found = next(one for one in metrics["detectors"] if one["factor"] == "de")
    return ["--feature", f"{found['layer']}/{found['feature']}", "--device", "cpu"]


def lines(path, texts) -> str:
    path.write_text("".join(text.replace("\n", " ") + "\n" for text in texts), encoding="utf-8")
    return str(path)


def answer(capsys, *argv: str) -> dict:
    code = main([*argv, "--model", "lab", "--json"])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


def test_a_sweep_of_german_raises_german_and_its_proposal_steers(capsys, german, tmp_path) -> None:
    prompts = lines(tmp_path / "prompts.txt", [one.text for one in neutral_prompts(seed=3, n=24)])
    recipe = str(tmp_path / "german.yaml")
    argv = ["sweep", prompts, *german, "--regex", r"\b(der|die|das|ist|ein|den|im|Sie|du)\b", "--sample"]
    argv += ["--amounts", "0.3,0.6,0.9", "--max-perplexity", "10", "--max-repetition", "1", "--max-new-tokens", "12"]
    found = answer(capsys, *argv, "--save-recipe", recipe)
    best = next(dose for dose in found["doses"] if dose["amount"] == found["proposed"])
    assert best["effect"]["estimate"] > found["doses"][0]["effect"]["estimate"] + 0.2
    argv = ["steer", "[12:30] Anna:", "--recipe", recipe, "--device", "cpu", "--max-new-tokens", "16"]
    assert language_of_text(answer(capsys, *argv)["steered"]["text"]) == "de"


def test_a_verdict_on_the_lab(capsys, german, tmp_path) -> None:
    def talk(language: str, n: int) -> list[str]:
        found = documents(seed=7, n=n, kinds=["talk"], languages=[language], registers=["plain"])
        return [one.text[:60] for one in found]

    sides = {"positive": talk("de", 20), "negative": talk("fr", 10) + talk("en", 10), "unrelated": talk("ru", 20)}
    argv = ["validate", lines(tmp_path / "prompts.txt", [one.text for one in neutral_prompts(seed=4, n=20)]), *german]
    argv += [f"--{name}={lines(tmp_path / f'{name}.txt', texts)}" for name, texts in sides.items()]
    argv += ["--amount", "0.6", "--regex", r"\b(der|die|das|ist|ein|den|im|Sie|du)\b", "--max-new-tokens", "8"]
    found = answer(capsys, *argv, "--selectivity")
    detection = found["evidence"]["detection"]
    assert detection["low"] > 0.1, "the card's detector fires on German"
    assert found["outcome"] in ("causal", "causal, but breaks fluency", "entangled", "correlated only")
    assert found["selectivity"]["features"]["full"]["estimate"] > 0, "without its feature German is harder to predict"
