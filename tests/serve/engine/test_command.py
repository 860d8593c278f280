"""`qwen-scope serve` where vLLM is: what it would execute, and what it refuses before anything starts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import served
from vllm.engine.arg_utils import EngineArgs

from qwen_scope import load_scope
from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.serve import FIELD, ServeSettings, engine_arguments, guard
from qwen_scope.serve.vllm_config import check_runnable
from qwen_scope.steer import Intervention, Recipe


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(shlex.split(line)[1:])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_dry_run_prints_what_would_be_executed(capsys: pytest.CaptureFixture[str]) -> None:
    line = "qwen-scope serve lab --layers 0-5 --feature-layers 4 --read-layers 4,5 --dry-run -- --port 8123"
    code, out, _ = run(f"{line} --dtype float32 --max-num-seqs 16", capsys)
    assert code == 0
    # six tables of 1 + 8 * 16 rows of 128 numbers of four bytes; 2,048 features of two SAEs
    assert f"tables {6 * 129 * 128 * 4 / 1e6:.1f} MB" in out
    words = shlex.split(out.splitlines()[-1])
    assert words[0] == "VLLM_PLUGINS=qwen_scope"
    at = words.index("--additional-config")
    settings = ServeSettings.from_json(json.loads(words[at + 1])[FIELD])
    assert (settings.layers, settings.feature_layers, settings.read_layers) == ((0, 1, 2, 3, 4, 5), (4,), (4, 5))
    assert words[words.index("--compilation-config") + 1] == '{"cudagraph_mode": "PIECEWISE"}'
    assert words[words.index("serve") + 2 :][:4] == ["--port", "8123", "--dtype", "float32"]
    assert words.count("--max-num-seqs") == 1
    assert words[words.index("--middleware") + 1] == "qwen_scope.serve.http.Middleware"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("qwen-scope serve lab", "at least one layer"),
        ("qwen-scope serve lab --layers 9", "there is no layer 9"),
        ("qwen-scope serve lab --layers 2 --rows 0", "--rows"),
        ("qwen-scope serve lab --layers 2 -- --additional-config={}", "--additional-config is set by qwen-scope serve"),
        ("qwen-scope serve lab --layers 2 -- --max-num-seqs many", "--max-num-seqs must be a whole number"),
        ("qwen-scope serve lab --layers 2 -- --dtype int4", "--dtype is one of"),
    ],
)
def test_what_cannot_be_served_is_refused(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(line, capsys)
    assert code == 2
    assert sentence in err


def test_recipes_are_checked_before_the_server_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe in relative units is served once its layers were measured."""
    scope = load_scope("lab")
    relative = Intervention.add(layer=4, feature=7, amount=0.5, unit="resid_norm")
    Recipe.of("polite", scope.model, [relative], scope.saes).save(tmp_path / "polite.json")
    line = f"qwen-scope serve lab --layers 4 --recipes {tmp_path} --dry-run"
    code, _, err = run(line, capsys)
    assert code == 2
    assert "no statistics of layer 4" in err
    stats = tmp_path / "stats" / "lab.stats"
    stats.parent.mkdir()
    code, out, _ = run(f"{line} --stats {stats}", capsys)
    assert code == 0
    assert str(stats) in out


def test_what_was_not_tested_is_refused_at_the_start() -> None:
    engine = EngineArgs(str(served.LAB / "model"), **engine_arguments(ServeSettings(layers=(2,), sae=None)))
    check_runnable(config := engine.create_engine_config())
    for part, name, value in (
        (config, "speculative_config", object()),
        (config, "kv_transfer_config", object()),
        (config, "lora_config", object()),
        (config.parallel_config, "pipeline_parallel_size", 2),
        (config.parallel_config, "data_parallel_size", 2),
        (config.parallel_config, "prefill_context_parallel_size", 2),
        (config.parallel_config, "enable_dbo", True),
    ):
        before = getattr(part, name)
        object.__setattr__(part, name, value)
        with pytest.raises(InputError, match="qwen-scope does not serve with"):
            check_runnable(config)
        object.__setattr__(part, name, before)
    check_runnable(config)


def test_an_unknown_version_of_vllm_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "installed", lambda: "0.99.1")
    with pytest.raises(Exception, match=r"vLLM 0\.99\.1 is installed and qwen-scope serves with vLLM 0\.32 and 0\.33"):
        guard.check()


def test_a_changed_seam_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    known = guard.SEAMS
    assert [seam.problem() for seam in known] == [None] * len(known)
    other = guard.Seam(guard.BLOCK_KEYS.module, guard.BLOCK_KEYS.name, ("request", "block"))
    gone = guard.Seam(guard.BLOCK_KEYS.module, "no_such_function", ())
    for wrong, sentence in ((other, "takes request, start_token_idx"), (gone, "has no no_such_function")):
        monkeypatch.setattr(guard, "SEAMS", (*known, wrong))
        with pytest.raises(Exception, match=sentence):
            guard.check()
