"""Rows that can't be used are counted, said once, passed over and kept in the run's record; none left is a sentence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import posttrain_tiny as small
import pytest
import tiny

from qwen_scope.cli import main
from qwen_scope.errors import InputError, QwenScopeWarning
from qwen_scope.model import load_model
from qwen_scope.posttrain import SFTRun, SynthesisOptions, held_out_loss, read_samples, run_sft
from qwen_scope.posttrain.data import PROMPTS
from qwen_scope.posttrain.sources import probe_texts, read_prompts, read_rows
from qwen_scope.text import Corpus, only_text, usable

GOOD = {"prompt": "hello ", "completion": "The weather is fine.", "group": "en"}
BAD = {
    "{no json": "bad JSON",
    '{"prompt": "hi ", "group": "en"}': "missing column",
    '{"prompt": "hi ", "completion": "", "group": "en"}': "empty",
    '{"prompt": "hi ", "completion": 3, "group": "en"}': "not text",
    '{"prompt": "hi ", "completion": null, "group": "en"}': "not text",
    '{"prompt": "hi ", "completion": "\\ud800", "group": "en"}': "not Unicode",
    '{"prompt": "", "completion": "Yes.", "group": "en"}': "with an empty prompt",
    '{"prompt": null, "completion": "Yes.", "group": "en"}': "without a prompt in 'prompt'",
    '{"completion": "Yes.", "group": "en"}': "without a prompt in 'prompt'",
    '{"prompt": 5, "completion": "Yes.", "group": "en"}': "without a prompt in 'prompt'",
}


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("bad", BAD)
def test_a_sample_that_can_not_be_used(tmp_path: Path, bad: str) -> None:
    path = written(tmp_path / "rows.jsonl", [GOOD, bad, GOOD, bad])
    unused = Counter[str]()
    with pytest.warns(QwenScopeWarning, match=r"2 of 4 rows of .* can't be used and are passed over: 2 ") as said:
        found = read_samples(path, column="completion", unused=unused)
    assert found == [GOOD, GOOD]
    assert unused == {BAD[bad]: 2}
    assert len(said) == 1
    only = written(tmp_path / "bad.jsonl", [bad])
    if "without a prompt" not in BAD[bad]:  # rows of texts alone are texts to learn from
        with pytest.raises(InputError, match="no row to learn from"):
            read_samples(only, column="completion")


def test_conversations_that_can_not_be_learnt_from(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"chat": one, "group": "en"} for one in (talk, talk[:1], talk[1:], [], [{"role": "user"}], "text")]
    path = written(tmp_path / "rows.jsonl", rows)
    with pytest.warns(QwenScopeWarning) as said:
        assert read_samples(path, column="chat") == [{"prompt": talk[:1], "completion": talk[1:], "group": "en"}]
    assert sum(int(str(one.message).split(" of ", 1)[0]) for one in said) == 5


def test_prompts_that_are_too_long_are_said_and_stand_in_the_record(tmp_path: Path) -> None:
    long = {**GOOD, "prompt": "hello " * 60}
    run = SFTRun(
        str(tiny.folder() / "model"), tmp_path / "run", method="plain", batch=4, accumulate=1, max_steps=1,
        max_length=48, warmup=0, device="cpu",
    )  # fmt: skip
    rows = [*small.ROWS, long, long]
    with pytest.warns(QwenScopeWarning, match=r"2 of 10 rows of the train data .*: 2 whose prompt fills max_length"):
        run_sft(run, rows, unused={"bad JSON": 3})
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["unused"] == {"bad JSON": 3, "whose prompt fills max_length": 2}
    with pytest.raises(InputError, match=r"none of the 2 samples of the train data .* 48 tokens; raise it"):
        run_sft(run, [long, long])


def test_so_they_are_under_the_auxiliary_loss(tmp_path: Path) -> None:
    long = {**small.ROWS[0], "prompt": "hello " * 60}
    with pytest.warns(QwenScopeWarning, match="1 of 9 rows of the train data"):
        trainer = small.train(tmp_path, rows=[*small.ROWS, long], per_device_train_batch_size=8)
    assert trainer.dropped == {"train": 1}


@pytest.mark.parametrize("bad", ["{no json", '{"prompt": ""}', '{"prompt": 3}', '{"question": "x"}', '{"prompt": [3]}'])
def test_prompts_that_can_not_be_used(tmp_path: Path, bad: str) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": 3}, bad, {"prompt": "b", "answer": "x"}])
    with pytest.warns(QwenScopeWarning, match="1 of 3 rows"):
        assert read_rows(str(path), PROMPTS, "answer", 10, "lab") == [
            {"prompt": "a", "answer": "3"}, {"prompt": "b", "answer": "x"},
        ]  # fmt: skip
    with pytest.warns(QwenScopeWarning, match="1 of 3 rows"):
        assert read_prompts(str(path), PROMPTS, "group", None, None, "lab") == ["a", "b"]
    with pytest.raises(InputError, match="has 0 prompts"):
        read_rows(str(written(tmp_path / "bad.jsonl", [bad])), PROMPTS, None, 10, "lab")


def test_answers_that_are_missing(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": 1},
        {"prompt": "b"},
        {"prompt": "c", "answer": None},
        {"prompt": "d", "answer": 0},
    ]
    with pytest.warns(QwenScopeWarning, match="2 without the column 'answer'"):
        found = read_rows(str(written(tmp_path / "rows.jsonl", rows)), PROMPTS, "answer", 10, "lab")
    assert [row["answer"] for row in found] == ["1", "0"]
    with pytest.raises(InputError, match="name it with answer_column="):
        read_rows(str(tmp_path / "rows.jsonl"), PROMPTS, "result", 10, "lab")


def test_a_command_names_the_option_for_the_answer(tmp_path: Path, capsys) -> None:
    path = written(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": 1}] * 3)
    words = ["posttrain", "rl", str(path), "-o", str(tmp_path / "out"), "--method", "vanilla", "--model", "lab"]
    assert main([*words, "--answer-column", "result"]) == 2
    assert "name it with --answer-column" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_loss_on_held_out_rows_that_begin_with_one_that_is_too_long() -> None:
    loaded = load_model(tiny.folder() / "model", device="cpu")
    long = {**GOOD, "prompt": "hello " * 60}
    with pytest.warns(QwenScopeWarning, match="1 of 2 rows of the eval data"):
        found = held_out_loss(loaded, [long, GOOD], max_length=48)
    assert found == pytest.approx(held_out_loss(loaded, [GOOD], max_length=48), abs=1e-6)


def test_texts_to_watch(tmp_path: Path) -> None:
    path = written(tmp_path / "probe.jsonl", [{"text": "one"}, {"text": ""}, "x", {"text": "two"}])
    with pytest.warns(QwenScopeWarning, match="2 of 4 rows of probe.jsonl .*: 1 empty, 1 bad JSON"):
        assert probe_texts(str(path)) == ["one", "two"]


def test_no_more_rows_are_read_than_asked_for() -> None:
    corpus = Corpus(["a", "", "b", "c", ""], name="five")
    with pytest.warns(QwenScopeWarning, match="1 of 3 rows of five"):
        assert usable(corpus, only_text, 2) == ["a", "b"]


def test_a_row_that_is_not_asked_for_is_no_problem() -> None:
    assert usable(Corpus(["a", "b"]), lambda found: found.text if found.text == "b" else None) == ["b"]


@pytest.mark.parametrize("command", ["prepare", "sft", "rl"])
def test_every_row_unusable_is_one_sentence(tmp_path: Path, capsys, command: str) -> None:
    path = written(tmp_path / "rows.jsonl", ["{no json", "{}", '{"prompt": 3}'])
    more = {"prepare": ["--target", "zh"], "sft": ["--method", "plain"], "rl": ["--method", "vanilla"]}[command]
    out = tmp_path / ("out.json" if command == "prepare" else "out")
    assert main(["posttrain", command, str(path), "-o", str(out), *more]) == 2
    said = capsys.readouterr().err.strip().split("\n")
    assert "rows.jsonl" in said[-1]
    assert "bad JSON" in said[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": True}, {"batch": 0}, {"accumulate": 1.5}, {"max_length": -1}, {"max_steps": -2}, {"warmup": -1},
        {"save_every": -3}, {"seed": -1}, {"lr": float("nan")}, {"lr": True}, {"epochs": float("inf")}, {"lora": 0},
        {"weight_decay": -0.1}, {"weight": float("nan")},
    ],
)  # fmt: skip
def test_a_number_of_a_run_that_can_not_be(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises((InputError, TypeError)) as said:  # TypeError: the tests also check the types
        SFTRun("lab", tmp_path, **wrong)
    if isinstance(said.value, InputError):
        assert next(iter(wrong)) in str(said.value) or "weight" in str(said.value)


@pytest.mark.parametrize("wrong", [{"want": True}, {"budget": 1.5}, {"tries": -1}, {"seed": -1}, {"batch": False}])
def test_a_number_of_a_synthesis_that_can_not_be(wrong: dict) -> None:
    with pytest.raises((InputError, TypeError)):
        SynthesisOptions(**wrong)
