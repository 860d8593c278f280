"""What a command takes as one object is the library's own dataclass, with the library's defaults."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any

import pytest
import typer
from typed import COMMANDS, context

from qwen_scope.cli import groups, main
from qwen_scope.cli.groups import OPTIONS, Read, attributes, fields_of, grouped, reader

MOST = 15
"""Parameters that a command's function may have."""


@pytest.mark.parametrize("kind", list(OPTIONS), ids=lambda kind: kind.__name__)
def test_options_of_a_group_have_the_defaults_of_its_class(kind: type) -> None:
    by_name = {field.name: field for field in fields(kind)}
    assert set(OPTIONS[kind]) <= set(by_name)
    for one in fields_of(kind):
        if one.name not in OPTIONS[kind]:
            continue  # of a group in it
        field = by_name[one.name]
        required = field.default is MISSING and field.default_factory is MISSING
        read = reader(OPTIONS[kind][one.name])
        shown = read is not None and read.shown is not None
        assert (one.default is one.empty) == (required and not shown), one.name
        if required or (read is None and field.default_factory is not MISSING):
            continue
        if read is None:
            assert one.default == field.default, one.name
        elif one.default is not None:
            assert read.value(one.default) == field.default, one.name


@dataclass(frozen=True)
class Inner:
    size: int = 3
    seed: int = 1


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner(size=4)
    layers: tuple[int, ...] = ()
    seed: int = 2


def test_a_group_is_made_of_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Annotated[int, typer.Option()]
    monkeypatch.setitem(OPTIONS, Inner, {"size": whole, "seed": whole})
    read = Read(lambda text: tuple(map(int, text.split("+"))))
    listed = Annotated[str | None, typer.Option(), read]
    monkeypatch.setitem(OPTIONS, Outer, {"name": Annotated[str, typer.Option()], "inner": Inner, "layers": listed})
    seen: list[Any] = []

    def command(outer, more, json=False):
        seen.append((outer, more, json))

    command.__annotations__ = {"outer": Outer, "more": dict, "json": bool}
    run = grouped(command, late=lambda: {"late": Annotated[str | None, typer.Option(), read]})
    assert list(run.__signature__.parameters) == ["name", "size", "seed", "layers", "json"]
    assert run.__signature__.parameters["size"].default == 4
    assert [one.name for one in run.late()] == ["late"]
    run(name="a", size=5, seed=7, layers=None, json=True)
    monkeypatch.setattr(groups, "late_values", lambda: {"late": "3", "later": None})
    run(name="b", size=4, seed=1, layers="1+2", json=False)
    assert seen == [
        (Outer("a", Inner(5, 7)), {}, True),
        (Outer("b", Inner(4, 1), (1, 2)), {"late": (3,)}, False),
    ]


def test_the_help_of_an_option_is_in_its_class() -> None:
    text = """One.

        Attributes:
            first: of two
                lines.   second: of none.
            third: the last.
    """.replace("\n    ", "\n")
    assert attributes(text) == {"first": "of two lines. second: of none.", "third": "the last."}


def test_train_offers_what_single_architectures_have(capsys) -> None:
    from qwen_scope.train import ARCHITECTURES

    assert main(["train", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, kind in ARCHITECTURES.items():
        for field in fields(kind):
            assert f"--{field.name.replace('_', '-')} " in out
            assert f" {name}: " in out
    line = "qwen-scope train lab -o x --d-sae 8 --k 2 --tokens 64 --architecture jumprelu --bandwidth 0.2"
    assert context(line).params["bandwidth"] == 0.2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--bandwidth", "0.2"], "bandwidth has no meaning for topk, only for jumprelu"),
        (["--architecture", "jumprelu", "--bandwidth", "0"], "bandwidth must be greater than 0"),
        (["--architecture", "matryoshka", "--prefixes", "0.5,a"], "no list of numbers"),
        (["--architecture", "matryoshka", "--prefixes", "0.5,0.7"], "end with 1"),
        (["--architecture", "jumpreluu"], "did you mean 'jumprelu'"),
    ],
)
def test_an_impossible_architecture_is_one_sentence(given: list[str], says: str, tmp_path, capsys) -> None:
    line = ["train", "lab", "-o", str(tmp_path / "run"), "--d-sae", "64", "--k", "4", "--tokens", "4096"]
    assert main([*line, "--batch", "512", *given]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_field_may_have_the_name_of_the_parameter_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, Inner, {"size": Annotated[int, typer.Option()]})

    def command(size):
        return size

    command.__annotations__ = {"size": Inner}
    assert grouped(command)(size=7) == Inner(7)


COUNTED = [
    "train", "eval", "synthesize", "label", "export", "posttrain prepare", "posttrain sft", "posttrain eval",
    "posttrain rl", "posttrain repetition", "classify transfer",
]  # fmt: skip


@pytest.mark.parametrize("path", COUNTED)
def test_a_command_has_few_parameters(path: str) -> None:
    function = COMMANDS[path].callback
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    assert len(inspect.signature(function).parameters) <= MOST
