"""Every command reads every kind of file, with the same options, and answers as for the same documents in JSONL."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from typed import COMMANDS, LEAVES

from qwen_scope.cli import main
from qwen_scope.cli.groups import OPTIONS, grouped
from qwen_scope.cli.sweep import read_prompts as prompts_of_sweep
from qwen_scope.errors import InputError
from qwen_scope.posttrain.data import PROMPTS
from qwen_scope.posttrain.sources import read_prompts, read_rows, training_samples
from qwen_scope.text import Corpus, CorpusOptions

MODEL = ["--model", str(tiny.folder() / "model"), "--device", "cpu"]
WHERE = [*MODEL, "--sae", str(tiny.folder() / "sae")]
KINDS = ["txt", "ndjson", "csv", "tsv", "parquet", "txt.gz", "jsonl.gz", "csv.gz", "tsv.gz", "parquet.gz", "folder"]
EAST = [{"text": f"车站在哪里 {i}"} for i in range(8)]
WEST = [{"text": f"hello, friend {i}"} for i in range(8)]
RICH = [kind for kind in KINDS if not kind.startswith("txt")]  # those with columns beside the text


def data_of(rows: list[dict[str, Any]], kind: str) -> bytes:
    """Rows as a file of a kind; in a text file a document is a line."""
    if kind == "txt":
        return "".join(row["text"] + "\n" for row in rows).encode()
    if kind == "parquet":
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), out)
        return out.getvalue()
    if kind in ("csv", "tsv"):
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0], delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return table.getvalue().encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder: Path, name: str, rows: list[dict[str, Any]], kind: str) -> str:
    """A corpus of a kind; a folder holds two files."""
    if kind == "folder":
        path = folder / name
        path.mkdir(parents=True)
        (path / "1.jsonl").write_bytes(data_of(rows[:3], "jsonl"))
        (path / "2.csv.gz").write_bytes(gzip.compress(data_of(rows[3:], "csv")))
        return str(path)
    path = folder / f"{name}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    bare = kind.removesuffix(".gz")
    path.write_bytes(gzip.compress(data_of(rows, bare)) if bare != kind else data_of(rows, bare))
    return str(path)


def plain(value: Any) -> Any:
    """An answer without where it came from and when."""
    gone = {"store", "source", "sample", "row", "folder", "bytes", "bytes_per_activation", "seconds", "student"}
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if name not in gone}
    return [plain(one) for one in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rule")
    east, west = (write(folder, name, rows, "jsonl") for name, rows in (("east", EAST), ("west", WEST)))
    assert main(["classify", "fit", east, west, "-r", str(folder / "rule.json"), "--top", "1", *WHERE]) == 0
    return str(folder / "rule.json")


def words(command: str, kind: str, folder: Path, rule: str) -> list[str]:
    """A command line that reads one kind of file."""
    both = [{**row, "language": language, "register": str(i % 2)} for i, row in enumerate(EAST + WEST)
            for language in ("a", "b")[i // 8:][:1]]  # fmt: skip
    east, west = write(folder, "east", EAST, kind), write(folder, "west", WEST, kind)
    mixed = write(folder, "mixed", both, kind)
    return {
        "extract": ["extract", mixed, "--unit", "line", "-o", str(folder / "store"), "--json", *WHERE],
        "find": ["find", "--positive", east, "--negative", west, "--layer", "0", "--json", *WHERE],
        "find repetition": ["find", "--repetition", west, "--layer", "0", "--json", *WHERE],
        "eval": ["eval", mixed, "--unit", "line", "--tokens", "64", "--context-length", "8", "--batch-size", "2",
                 "--no-loss", "--count", "all", "--layers", "0", "--json", *WHERE],
        "predict": ["classify", "predict", rule, mixed, *WHERE],
        "distil": ["classify", "distil", rule, mixed, "-s", str(folder / "s.json"), "--json", *WHERE],
        "fit": ["classify", "fit", east, west, "--name", "x", "--layers", "0", "--json", *WHERE],
        "transfer": ["classify", "transfer", mixed, "--positive", "register=0", "--layers", "0", "--json", *WHERE],
    }[command]  # fmt: skip


def answer(command: str, kind: str, folder: Path, rule: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main(words(command, kind, folder, rule)) == 0, capsys.readouterr().err
    return [plain(json.loads(line)) for line in capsys.readouterr().out.splitlines()] if command == "predict" else (
        plain(json.loads(capsys.readouterr().out)))  # fmt: skip


# Those that differ in how they read; the others read through the same function.
LIGHT, OTHERS = ["extract", "find", "predict"], ["find repetition", "eval", "distil"]
SOME = ["csv.gz", "parquet"]


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """What each command answered for JSONL."""
    return {}


@pytest.mark.parametrize(
    ("command", "kind"),
    [(command, kind) for command in LIGHT for kind in KINDS]
    + [(command, kind) for command in OTHERS for kind in SOME]
    + [pytest.param(command, kind, marks=pytest.mark.slow) for command in OTHERS for kind in KINDS if kind not in SOME]
    + [pytest.param("fit", kind, marks=pytest.mark.slow) for kind in ("txt.gz", "parquet", "folder")]
    + [pytest.param("transfer", kind, marks=pytest.mark.slow) for kind in ("csv", "parquet.gz")],
)
def test_the_answer_is_that_for_jsonl(
    command: str, kind: str, tmp_path: Path, rule: str, known: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if command not in known:
        known[command] = answer(command, "jsonl", tmp_path / "known", rule, capsys)
    assert answer(command, kind, tmp_path, rule, capsys) == known[command]


CHATS = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}.", "group": "en", "answer": str(2 * i)}
         for i in range(5)]  # fmt: skip


@pytest.mark.parametrize("kind", RICH)
def test_rows_to_learn_from_and_prompts(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, "chats", CHATS, kind)
    rows = training_samples(path, CorpusOptions(column="completion"), "prompt", "group")
    assert rows == [{name: row[name] for name in ("prompt", "completion", "group")} for row in CHATS]
    asked = [row["prompt"] for row in CHATS]
    assert read_prompts(path, PROMPTS, "group", ["en"], None, "lab") == asked
    found = read_rows(path, PROMPTS, "answer", 10, "lab")
    assert found == [{name: row[name] for name in ("prompt", "answer")} for row in CHATS]
    assert prompts_of_sweep(path, CorpusOptions(column="prompt")) == asked


@pytest.mark.parametrize("kind", ["txt", "txt.gz"])
def test_prompts_that_are_lines(kind: str, tmp_path: Path) -> None:
    asked = [row["prompt"] for row in CHATS]
    path = write(tmp_path, "prompts", [{"text": text} for text in asked], kind)
    assert read_prompts(path, PROMPTS, "group", None, None, "lab") == asked
    assert [row["prompt"] for row in read_rows(path, PROMPTS, None, 10, "lab")] == asked
    assert prompts_of_sweep(path) == asked


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_train_takes_the_documents_of_its_options(kind: str, tmp_path: Path) -> None:
    from qwen_scope.train import TrainConfig, TrainRun
    from qwen_scope.train.run import corpus_of

    path = write(tmp_path, "data", WEST, kind)
    config = TrainConfig(d_sae=64, k=4, tokens=64, batch=32, seed=3)
    options = CorpusOptions(sample=4, seed=3)
    run = TrainRun(data=path, out=tmp_path / "out", train=config, corpus=options, hold_out=0, eval_tokens=0)
    assert [one.text for one in corpus_of(run)] == [one.text for one in Corpus(path, sample=4, seed=3, shuffle=3)]
    assert {one.text for one in corpus_of(run)} == {one.text for one in Corpus(path, sample=4, seed=3)}


READERS = [
    "extract", "train", "eval", "find", "classify fit", "classify predict", "classify distil", "classify transfer",
    "synthesize", "posttrain prepare", "posttrain sft", "posttrain eval", "posttrain rl", "posttrain repetition",
    "sweep", "validate", "lens fit", "score",
]  # fmt: skip
# `prepare` learns from texts as they stand; `--unit` and `--sample` of steering are about something else.
LACKS = {"posttrain prepare": {"chat"}, "sweep": {"unit", "sample"}, "validate": {"unit", "sample"}}


@pytest.mark.parametrize("path", READERS)
def test_commands_that_read_documents_have_the_same_options(path: str) -> None:
    assert path in LEAVES
    by_name = {option: one for one in COMMANDS[path].params for option in one.opts}
    first = {option: one for one in COMMANDS["extract"].params for option in one.opts}
    for field in OPTIONS[CorpusOptions]:
        if field in LACKS.get(path, ()):
            continue
        option = by_name[f"--{field}"]
        assert option.name == field
        if field not in ("seed", "sample", "chat"):  # of which a command says more
            assert option.help == first[f"--{field}"].help


def test_no_other_command_has_them() -> None:
    some = {path for path in LEAVES for one in COMMANDS[path].params if {"--column", "--subset"} & set(one.opts)}
    assert some == set(READERS)


def test_a_group_is_the_whole_dataclass_with_its_defaults() -> None:
    assert list(OPTIONS[CorpusOptions]) == list(CorpusOptions.__dataclass_fields__)
    shown = {one.name: one.default for one in COMMANDS["extract"].params}
    for name, field in CorpusOptions.__dataclass_fields__.items():
        assert shown[name] == field.default


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--colum", "text"], "No such option"),
        (["--unit", "word"], "a document of a text file is one of paragraph, line, file"),
        (["--chat", "loud"], "--chat is one of default, thinking, non_thinking"),
        (["--sample", "0"], "--sample"),
    ],
)
@pytest.mark.parametrize("command", ["extract", "predict"])
def test_what_is_misspelt_is_refused(
    command: str, extra: list[str], says: str, tmp_path: Path, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(command, "jsonl", tmp_path, rule)
    if command == "extract" and extra[0] == "--unit":
        line = [word for word in line if word not in ("--unit", "line")]
    assert main([*line, *extra]) == 2
    assert says in capsys.readouterr().err


def test_a_command_s_own_parameter_is_the_field() -> None:
    got: list[Any] = []

    @grouped
    def command(source: str, seed: int = 7, reading: CorpusOptions = CorpusOptions(unit="file")) -> None:  # noqa: B008
        got.extend((source, seed, reading))

    values = {"column": "a", "unit": "line", "sample": None, "split": "s", "subset": None, "chat": None}
    command(source="x", seed=9, **values)
    assert got == ["x", 9, CorpusOptions("a", "line", None, 9, "s")]


@pytest.mark.parametrize(
    ("values", "says"),
    [({"unit": "word"}, "paragraph"), ({"sample": 0}, "one row"), ({"sample": -1}, "sample")],
)
def test_options_that_can_t_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        CorpusOptions(**values)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("posttrain sft lab -n 8", "posttrain sft lab --sample 8"),
        ("posttrain sft lab -n8", "posttrain sft lab --sample=8"),
        ("posttrain prepare lab -n 8", "posttrain prepare lab --sample 8"),
        ("posttrain rl lab --prompt-column=q", "posttrain rl lab --column=q"),
        ("synthesize lab -n 8", "synthesize lab --sample 8"),
    ],
)
def test_old_spellings_are_told_and_read(old: str, new: str) -> None:
    from qwen_scope.cli.spellings import respelled
    from qwen_scope.errors import QwenScopeWarning

    with pytest.warns(QwenScopeWarning, match="is now --"):
        assert respelled(old.split()) == new.split()
    assert respelled(new.split()) == new.split()
