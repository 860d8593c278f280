"""What a server that starts is told and tested with, without vLLM."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from qwen_scope import serve
from qwen_scope.errors import QwenScopeError
from qwen_scope.serve import ServeSettings, selftest
from qwen_scope.serve.command import flag_of

SETTINGS = ServeSettings(sae="lab", layers=(2,), feature_layers=(4,))
PLAIN = {5: -0.5, 6: -1.0}
FELT = {5: -3.0, 9: -0.1}


def test_flags_are_read_in_either_form() -> None:
    assert flag_of(["--port", "1", "--max-num-seqs", "8"], "--max-num-seqs") == 8
    assert flag_of(["--max-num-seqs=9"], "--max-num-seqs") == 9
    assert flag_of(["--dtype=half"], "--dtype") == "half"
    assert flag_of(["--dtyped=half"], "--dtype") is None
    for flags in (["--max-num-seqs"], ["--max-num-seqs", "many"], ["--max-num-seqs=-1"]):
        with pytest.raises(QwenScopeError, match="--max-num-seqs"):
            flag_of(flags, "--max-num-seqs")


def test_every_layer_and_kind_of_operation_is_tested() -> None:
    names = [name for name, _ in selftest.asks(SETTINGS, 128)]
    assert names == ["nothing", "add at layer 2", "add at layer 4", "clamp at layer 4", "nothing, once more"]


def test_a_change_that_is_not_felt_keeps_a_server_from_serving() -> None:
    selftest.judge(SETTINGS, 128, [PLAIN, FELT, FELT, FELT, PLAIN])
    for missing, name in ((1, "add at layer 2"), (3, "clamp at layer 4")):
        found = [PLAIN, FELT, FELT, FELT, PLAIN]
        found[missing] = PLAIN
        with pytest.raises(QwenScopeError, match=f"{name} left the log-probabilities as they were"):
            selftest.judge(SETTINGS, 128, found)
    with pytest.raises(QwenScopeError, match="an unsteered request felt"):
        selftest.judge(SETTINGS, 128, [PLAIN, FELT, FELT, FELT, FELT])


def test_a_worker_without_the_plugin_keeps_a_server_from_serving() -> None:
    selftest.check_workers([{"rows": 3}])
    with pytest.raises(QwenScopeError, match="not at work in the worker of rank 1"):
        selftest.check_workers([{"rows": 3}, None])


def test_the_room_unpickles_nothing() -> None:
    """What clients send and what processes of the server tell each other is JSON and plain values."""
    folder = Path(next(iter(serve.__path__)))
    modules = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in folder.glob("*.py")}
    assert len(modules) > 20
    for name, tree in modules.items():
        for node in ast.walk(tree):
            named = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                named.append(f"{node.value.id}.{node.attr}")
            assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch.load"} & set(named), name
