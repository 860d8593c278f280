"""`torchrun ... extract --on torchrun`: two processes write the store of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stores
import tiny
from test_merge import same

pytestmark = pytest.mark.slow

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]
WORDS = ["--window", "90", "--batch", "80", "--row", "7", "--pool", "mean,last", *WHERE]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def extract(corpus: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in two processes."""
    command = [*TORCHRUN, "-m", "qwen_scope.cli", "extract", str(corpus), "-o", str(out), *WORDS, *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_two_processes_write_the_store_of_one(tmp_path: Path, capsys) -> None:
    from qwen_scope.cli import main

    corpus, two = tmp_path / "c.jsonl", tmp_path / "two"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in [*stores.ROWS * 2, {"other": 1}]))
    done = extract(corpus, two, "--on", "torchrun", "--json")
    assert done.returncode == 0, done.stderr
    assert main(["extract", str(corpus), "-o", str(tmp_path / "one"), *WORDS, "--json"]) == 0
    told, expected = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    for each in (told, expected):
        del each["store"], each["bytes"], each["bytes_per_activation"]
    assert told == expected, "one of them tells"
    same(two, tmp_path / "one")
    assert not (two / "work").exists()
    again = extract(corpus, two, "--on", "torchrun", "--json")
    assert again.returncode == 0, again.stderr
    refused = extract(corpus, two, "--on", "torchrun", "--max-tokens", "9")
    assert refused.returncode
    assert "max_tokens was None, now 9" in refused.stderr
