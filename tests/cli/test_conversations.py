"""`--chat` where commands read tokens: conversations are rendered with the template; without it they are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from qwen_scope.cli import main
from qwen_scope.model import load_tokenizer
from qwen_scope.posttrain.data import PROMPTS
from qwen_scope.posttrain.sources import read_rows, training_samples
from qwen_scope.scope import load_scope
from qwen_scope.text import CorpusOptions, render

MODEL = str(tiny.folder() / "model")
WHERE = ["--model", MODEL, "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]


def talk(text: str, *more: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": one} for i, one in enumerate((text, *more))]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("talks")
    east = write(folder / "east.jsonl", [{"text": talk("车站在哪里", f"很好 {i}")} for i in range(8)])
    west = write(folder / "west.jsonl", [{"text": talk("hello", f"friend {i}")} for i in range(8)])
    plain = write(folder / "plain.jsonl", [{"text": f"hello {i}"} for i in range(4)] + [{"text": talk("hi", "x")}])
    made = {"east": east, "west": west, "plain": plain, "rule": str(folder / "rule.json")}
    assert main(["classify", "fit", east, west, "-r", made["rule"], "--top", "1", "--chat", "default", *WHERE]) == 0
    return made


def test_predict_reads_what_the_model_reads(files: dict[str, str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.jsonl"
    words = ["classify", "predict", files["rule"], files["east"], *WHERE, "-o", str(out)]
    assert main([*words, "--chat", "default"]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 8
    scope = load_scope(MODEL, tiny.folder() / "sae", device="cpu")
    feature = json.loads(Path(files["rule"]).read_text())["features"][0]
    seen = scope.features([talk("车站在哪里", f"很好 {i}") for i in range(8)], [feature["layer"]], chat="default")
    acts = seen.acts[feature["layer"]]
    top = np.where(acts.indices.numpy() == feature["feature"], acts.values.float().numpy(), 0).max((1, 2))
    for answer, value in zip(answers, top, strict=True):
        if answer["label"]:
            assert answer["because"][0]["value"] == pytest.approx(float(value), rel=1e-4)
    assert any(answer["label"] for answer in answers)


@pytest.mark.filterwarnings("default::qwen_scope.errors.QwenScopeWarning")
def test_without_chat_they_are_counted(files: dict[str, str], tmp_path: Path, capsys) -> None:
    assert main(["classify", "predict", files["rule"], files["plain"], *WHERE, "-o", str(tmp_path / "out.jsonl")]) == 0
    assert "1 of 5 rows of plain.jsonl can't be used" in capsys.readouterr().err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    assert main(["classify", "predict", files["rule"], files["east"], *WHERE]) == 2
    assert "--chat default" in capsys.readouterr().err
    assert main(["find", "--positive", files["east"], "--negative", files["west"], *WHERE]) == 2
    assert "8 a conversation, not a text" in capsys.readouterr().err
    assert main(["extract", files["east"], "-o", str(tmp_path / "store"), *WHERE]) == 2
    said = capsys.readouterr().err
    assert "8 a conversation, not a text" in said
    assert "pass --chat default to read conversations" in said


def test_find_tells_conversations_apart(files: dict[str, str], capsys) -> None:
    words = ["find", "--positive", files["east"], "--negative", files["west"], "--layer", "0", "--json", *WHERE]
    assert main([*words, "--chat", "default"]) == 0
    assert json.loads(capsys.readouterr().out)["found"]
    assert main([*words, "--chat", "default", "--negative", files["east"]]) == 2
    assert "in both sets" in capsys.readouterr().err


def test_prompts_are_what_the_template_makes_of_them(tmp_path: Path) -> None:
    rows = [{"prompt": "hi"}, {"prompt": talk("one", "two", "three")}, {"prompt": talk("one", "two")}]
    path = write(tmp_path / "p.jsonl", rows)
    tokenizer = load_tokenizer(MODEL)
    how = CorpusOptions(**{**vars(PROMPTS), "chat": "non_thinking"})
    with pytest.warns(match="1 a conversation that is answered"):
        found = read_rows(path, how, None, 10, MODEL)
    assert [row["prompt"] for row in found] == [
        render(tokenizer, one, "non_thinking").text for one in ("hi", talk("one", "two", "three"))
    ]


@pytest.mark.parametrize("chat", ["default", "non_thinking"])
def test_samples_are_cut_where_the_answer_begins(tmp_path: Path, chat: Any) -> None:
    path = write(tmp_path / "s.jsonl", [{"prompt": "hi", "completion": "hello", "group": "en"}])
    found = training_samples(path, CorpusOptions(column="completion", chat=chat), "prompt", "group", MODEL)
    tokenizer = load_tokenizer(MODEL)
    assert found[0]["prompt"] == render(tokenizer, "hi", chat).text
    assert found[0]["completion"] == "hello<|im_end|>"
