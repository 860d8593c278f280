"""`app.py` takes the official demo's flags, and says where one contradicts the weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

APP = Path(__file__).parents[2] / "app.py"
FLAGS = (
    "--model --model-name-sae-trained-from --model-name-analyzing-now --sae-path --top-k --num-layers --sae-width"
    " --d-model --sae-cache-max --server-port"
)


@pytest.fixture(scope="module")
def app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("app", APP)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_it_has_exactly_the_demos_flags(app: ModuleType) -> None:
    found = {flag for action in app.parser()._actions for flag in action.option_strings} - {"-h", "--help"}
    assert found == set(FLAGS.split())


def test_flags_that_agree_with_the_weights(app: ModuleType) -> None:
    given = "--model lab --top-k 40 --num-layers 6 --sae-width 2048 --d-model 128 --sae-cache-max 2"
    names = ["--model-name-analyzing-now", "My model", "--model-name-sae-trained-from", "Its base"]
    state = app.opened(app.parser().parse_args([*given.split(), *names]))
    assert (state.model_name, state.trained_from) == ("My model", "Its base")
    for layer in state.layers:
        state.scope.saes[layer]
    assert len(state.scope.saes.held) == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--top-k 50", "k=50 was asked for, but this SAE was trained with k=40"),
        ("--num-layers 36", "--num-layers says 36, the weights say 6"),
        ("--sae-width 65536", "--sae-width says 65536, the weights say 2048"),
        ("--d-model 4096", "--d-model says 4096, the weights say 128"),
        ("--sae-cache-max 0", "--sae-cache-max is at least 1"),
        ("--sae-path /nowhere/at/all", "nowhere"),
    ],
)
def test_flags_that_contradict_the_weights(
    app: ModuleType, capsys: pytest.CaptureFixture[str], flags: str, says: str
) -> None:
    assert app.main(flags.split()) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
