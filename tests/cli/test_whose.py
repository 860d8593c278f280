"""The lab never answers for another model unsaid, and messages speak the language of who reads them."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest
import tiny
from typed import COMMANDS, LEAVES, context

from qwen_scope.cli import commands, main, whose
from qwen_scope.cli.commands import in_options
from qwen_scope.errors import InputError

NOTE = f"qwen-scope: {whose.NOTE}\n"


OWN = [
    'features "The weather"',
    "features -",
    "compare a b",
    "steer Once --feature 5/6 --amount 1",
    "extract corpus.jsonl -o out",
    "extract owner/name -o out",
    "find --positive rude.txt --negative polite.txt",
    "find --positive lab:language=de --negative mine.txt",
    "find --promotes house",
    "find --repetition texts.txt",
    "sweep prompts.txt --feature 5/6 --regex x",
    "validate p.txt --positive a --negative b --unrelated c --feature 5/6",
    "train texts.jsonl -o out --d-sae 64 --k 4 --tokens 4096",
    "eval texts.jsonl",
    "explore --store mine",
    "classify fit a.txt b.txt",
    "classify predict rule.json c.jsonl",
    "classify distil rule.json lab -s s.json",
    "classify transfer c.jsonl --positive a=b",
    "posttrain prepare rows.jsonl --target zh -o t.json",
    "posttrain prepare lab --target zh -o t.json --onsets rows.jsonl --script CJK",
    "posttrain sft rows.jsonl -o out",
    "posttrain sft lab --held-out rows.jsonl -o out",
    "posttrain eval --held-out rows.jsonl",
    "posttrain repetition p.jsonl -o r.json",
    "posttrain rl p.jsonl -o out",
]
NOT_SAID = [
    'features "The weather" --model lab',
    "extract lab -o out",
    "find --positive lab:language=de --negative lab:language=fr",
    "find --near 5/678",
    "find store --groups language",
    "show store --feature 3",
    "show --layer 5 --feature 3",
    "train lab -o out --d-sae 64 --k 4 --tokens 4096",
    "eval lab",
    "eval mine.txt --model Qwen/Qwen3-1.7B-Base",
    "explore",
    "classify transfer lab --positive register=rude",
    "posttrain eval lab --script CJK",
    "posttrain rl lab --held-out lab -o out",
    "synthesize mine.jsonl --store store -f 3 -o out",
    "plan lab",
    "convert lab -o out",
    "demo hello",
]


@pytest.mark.parametrize("line", [*OWN, *NOT_SAID])
def test_the_lab_is_named_where_nobody_asked_for_it(line: str) -> None:
    token = commands._RUNNING.set(context(f"qwen-scope {line}"))
    try:
        assert whose.lab_by_default() is (line in OWN)
    finally:
        commands._RUNNING.reset(token)


def test_every_command_with_a_model_says_whose_it_is() -> None:
    for path in LEAVES:
        if any(one.name == "model" for one in COMMANDS[path].params) and path not in ("convert", "plan", "serve"):
            module = inspect.getsource(inspect.getmodule(COMMANDS[path].callback.__wrapped__))
            nodes = list(ast.walk(ast.parse(module)))
            names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            names |= {node.id for node in nodes if isinstance(node, ast.Name)}
            assert names & {"say_whose", "open_asked", "open_scope", "scope_of"}, path


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["features", "The weather"], ["compare", "The weather", "A station"], ["eval", "OWN", "--tokens", "600"]],
)
def test_it_is_one_line_on_standard_error(words: list, tmp_path: Path, capsys) -> None:
    (tmp_path / "own.txt").write_text("The weather is fine today.\n\n" * 200, encoding="utf-8")
    words = [str(tmp_path / "own.txt") if word == "OWN" else word for word in words]
    assert main([*words, "--layers", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == NOTE
    json.loads(out)
    assert main([*words, "--layers", "5", "--json", "--model", "lab"]) == 0
    assert capsys.readouterr() == (out, "")


def test_a_refused_command_does_not_say_it_first(capsys) -> None:
    assert main(["features", "x", "--chat", "loud"]) == 2
    assert "lab" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["features", "compare", "eval"])
@pytest.mark.parametrize("sae", ["SAE-Res-Qwen3-8B-Base-W64K-L0_50", "qwen/sae-res-qwen3-8b-base-w64k-l0_50"])
def test_saes_of_the_catalog_name_their_model(command: str, sae: str, capsys) -> None:
    assert main([command, *{"compare": ["a", "b"], "eval": ["lab"]}.get(command, ["a"]), "--sae", sae]) == 2
    assert capsys.readouterr().err == (
        f"qwen-scope: the SAEs {sae} were made on Qwen/Qwen3-8B-Base, and without --model the lab is taken:"
        " add --model Qwen/Qwen3-8B-Base\n"
    )


def test_a_folder_of_saes_names_its_model(tmp_path: Path, capsys) -> None:
    from qwen_scope import load_sae, save_sae

    for name, said, refused in (("own", "owner/model", True), ("ours", "lab", False), ("none", None, False)):
        save_sae(load_sae("lab", 5), tmp_path / name)
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **({"model": said} if said else {})}))
        assert main(["features", "x", "--sae", str(tmp_path / name), "--json"]) == (2 if refused else 0)
        assert ("and without --model the lab is taken: add --model owner/model" in capsys.readouterr().err) is refused


FLAGS = {"sae": "--sae", "k": "--k", "chat": "--chat", "truncate": "--truncate", "layer": "--layer", "n": "-n"}


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("name one with sae=: A, B", "name one with --sae: A, B"),
        ("name them with sae= (a folder or hub id)", "name them with --sae (a folder or hub id)"),
        ("pass k=", "pass --k"),
        ("pass k=; 'x'", "pass --k; 'x'"),
        ("pass chat='default' to use it", "pass --chat default to use it"),
        ("shorten it or pass truncate=True to keep", "shorten it or pass --truncate to keep"),
        ("choose one with layer=: 1, 2", "choose one with --layer: 1, 2"),
        ("the config says k=50, but the file says k=40", "the config says k=50, but the file says k=40"),
        ("revision=: none", "revision=: none"),
        ("language=de,register=rude", "language=de,register=rude"),
        ("write column=value", "write column=value"),
        ("a.k= and --k=", "a.k= and --k="),
        ("https://x/?k=&n=3", "https://x/?k=&n=3"),
    ],
)
def test_parameters_become_options(python: str, shell: str) -> None:
    assert in_options(python, FLAGS) == shell


def test_the_command_line_says_options_and_python_says_parameters(tmp_path: Path, capsys) -> None:
    from qwen_scope import load_scope

    with pytest.raises(InputError, match=r"name one with sae=: SAE-Res"):
        load_scope("Qwen/Qwen3-1.7B-Base")
    assert main(["features", "x", "--model", "Qwen/Qwen3-1.7B-Base"]) == 2
    assert "name one with --sae: SAE-Res" in capsys.readouterr().err
    where = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae")]
    assert main(["features", "word " * 200, *where]) == 2
    assert "--truncate" in capsys.readouterr().err
    assert main(["features", "word " * 200, *where, "--truncate"]) == 0


@pytest.mark.slow
def test_no_message_names_a_parameter_in_a_way_that_is_not_translated() -> None:
    """Every `name=` in a sentence that is raised has a form that `in_options` knows, or a value that is no setting."""
    flags = {
        one.name: one.opts[0] for path in LEAVES for one in COMMANDS[path].params if one.param_type_name == "option"
    }
    source = Path(inspect.getfile(commands)).parents[1]
    for path in sorted(source.rglob("*.py")):
        if path.is_relative_to(source / "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                text = "".join(
                    part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "X"
                    for part in ast.walk(node.exc)
                    if isinstance(part, ast.Constant | ast.FormattedValue)
                )
                left = in_options(text, flags)
                for name in ("sae", "layers", "layer", "chat", "truncate", "model", "column", "device"):
                    assert f" {name}=" not in left, f"{path.name}:{node.lineno}: {text}"
