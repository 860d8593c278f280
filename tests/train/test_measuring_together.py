"""`qwen-scope eval` in two processes gives the figures of one, and an error of one process ends both."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.model import load_model
from qwen_scope.train import EvalRun

# The tiny model has no sinks, and some texts are short; the command line prints that.
pytestmark = pytest.mark.filterwarnings("always::qwen_scope.errors.QwenScopeWarning")

WHERE = {"model": str(tiny.folder() / "model"), "sae": str(tiny.folder() / "sae")}

SCRIPT = """
import json, sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from qwen_scope import train
from qwen_scope.cli.evaluate import plain
from qwen_scope.errors import InputError
from qwen_scope.sae import leave_group
from qwen_scope.train import EvalRun, evaluate, join, run_eval
out, given, mode = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
ranks = join(mode, "gloo")
run = EvalRun(**given, device="cpu", parallel=mode, remember=False, context_length=24)
found = []
for tokens, rows, post in ((2600, 3, run.post), (600, 64, None)):
    told = []
    one = replace(run, tokens=tokens, batch_size=rows, post=post)
    found.append(plain(run_eval(one, progress=lambda *step: told.append(step))))
    assert bool(told) == ranks.first, "only the first one tells"
if ranks.world > 1:
    read = evaluate.capture
    for kind, sentence in ((InputError, "a row that can't be read"), (RuntimeError, "no memory")):
        def capture(*given, kind=kind, sentence=sentence):
            if ranks.rank == 1:
                raise kind(sentence)
            return read(*given)
        evaluate.capture = capture
        try:
            run_eval(replace(run, tokens=1000, batch_size=2, post=None))
        except (InputError, RuntimeError) as error:
            found.append([type(error).__name__, str(error)])
json.dump(found, open(f"{out}/{mode}-{ranks.rank}.json", "w"))
leave_group()
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Texts, and a checkpoint whose weights have moved."""
    folder = tmp_path_factory.mktemp("together")
    corpus = folder / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(80) for text in tiny.TEXTS[:3]))
    shutil.copytree(WHERE["model"], folder / "model")
    model = load_model(WHERE["model"], device="cpu").model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * parameter.std())
    model.save_pretrained(folder / "model")
    return {**WHERE, "data": str(corpus), "post": str(folder / "model")}


def check_same(one: Any, two: Any, at: str = "") -> None:
    """Whole numbers, names and verdicts are equal, other numbers to 1e-6."""
    if isinstance(one, dict):
        assert list(one) == list(two), at
        for name, value in one.items():
            check_same(value, two[name], f"{at}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(two), at
        for number, (a, b) in enumerate(zip(one, two, strict=True)):
            check_same(a, b, f"{at}/{number}")
    elif isinstance(one, float):
        assert math.isclose(one, two, rel_tol=1e-6, abs_tol=1e-9) or (one != one and two != two), f"{at}: {one}, {two}"
    else:
        assert one == two, at


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(given: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    running = []
    for mode, rank in (("alone", 0), ("data", 0), ("data", 1)):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
        words = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), json.dumps(given), mode]
        environment = {**os.environ, **(place if mode == "data" else {})}
        running.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=280)[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(errors)
    one, *both = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone-0", "data-0", "data-1"))
    for rank, two in enumerate(both):
        check_same(one, two[:2])
        assert two[2] == ["InputError", "a row that can't be read"], "the sentence of one process is that of both"
        mine = ["RuntimeError", "no memory"]
        assert two[3] == (mine if rank else ["InputError", "another process of the group has ended: no memory"])
    assert one[0]["quality"]["layers.0.resid_post"]["tokens"] > 1000
    assert one[0]["fits"]["layers.2.resid_post"]["figures"]
    assert one[0]["fits"]["layers.2.resid_post"]["moves"]["tested"]


def started(words: list[str]) -> subprocess.CompletedProcess[str]:
    """A command in two processes that share the data."""
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*many, "-m", "qwen_scope.cli", *words, "--parallel", "data"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.mark.slow
def test_a_run_measures_what_it_trained_together(
    given: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes train, go on from what they trained, and measure both; one process finds the same figures."""
    corpus = tmp_path / "c.txt"  # of a hundred documents one is held out
    corpus.write_text("\n\n".join(f"{' '.join(tiny.TEXTS[:3])} {i}" for i in range(500)))
    rows = ["--context-length", "24", "--batch-size", "2", "--device", "cpu"]
    own = ["train", str(corpus), "--model", given["model"], *rows, "--tokens", "1280", "--batch", "64"]
    own += ["--eval-tokens", "200", "--layers", "0,2", "--d-sae", "64", "--k", "4"]
    new = ["-o", str(tmp_path / "a")]
    for more in (new, ["--start-from", str(tmp_path / "a" / "SAE-Res-model-W64-L0_4"), "-o", str(tmp_path / "b")]):
        done = started([*own, *more])
        assert done.returncode == 0, done.stderr
        out = Path(more[-1])
        (group,) = out.glob("SAE-*")
        asked = ["eval", str(corpus), "--model", given["model"], "--sae", str(group), *rows]
        assert main([*asked, "--tokens", "200", "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)["quality"]
        together = json.loads((out / "quality.json").read_text())
        assert set(together) == {"layers.0.resid_post", "layers.2.resid_post"}
        for name, one in together.items():
            found = {figure: value for figure, value in one.items() if figure in alone[name]}
            assert len(found) > 12
            assert one["tokens"] > 100
            check_same({figure: alone[name][figure] for figure in found}, found, name)
    first = json.loads((tmp_path / "a" / "quality.json").read_text())["layers.0.resid_post"]
    assert together["layers.0.resid_post"]["began"]["before"]["fvu"] == pytest.approx(first["fvu"], rel=1e-3)


@pytest.mark.slow
def test_torchrun_prints_once(given: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    def words(corpus: str) -> list[str]:
        size = ["--tokens", "1000", "--context-length", "24", "--batch-size", "2", "--device", "cpu", "--json"]
        return ["eval", corpus, "--model", given["model"], "--sae", given["sae"], *size]

    done = started(words(given["data"]))
    assert done.returncode == 0, done.stderr
    assert main(words(given["data"])) == 0
    check_same(json.loads(capsys.readouterr().out), json.loads(done.stdout))
    refused = started(words("nowhere.jsonl"))
    assert refused.returncode
    assert refused.stderr.count("there is no file, folder or dataset 'nowhere.jsonl'") == 1
    assert not refused.stdout
    misspelt = started([*words(given["data"]), "--tokens", "many"])
    assert misspelt.returncode
    assert misspelt.stderr.count("Usage: ") == 1


def test_what_can_t_be_shared_is_refused(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="divides data, not 'layers'"):
        EvalRun("c.jsonl", parallel="layers")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["eval", given["data"], "--parallel", "data"]) == 2
    assert "torchrun --nproc-per-node N -m qwen_scope.cli eval" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["eval", given["data"]]) == 2
    assert "torchrun has started 3 processes, which share the work with --parallel data" in capsys.readouterr().err
