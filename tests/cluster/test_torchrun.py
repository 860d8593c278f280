"""`torchrun ... extract --on torchrun`: two processes write the store of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stores
import tiny
from killing import of_rank
from test_merge import same

pytestmark = pytest.mark.slow

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]
WORDS = ["--window", "90", "--batch", "80", "--row", "7", "--pool", "mean,last", *WHERE]
DEADLINE = 240  # seconds
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(corpus: Path, out: Path, *words: str) -> list[str]:
    """The command in two processes."""
    return [*TORCHRUN, "-m", "qwen_scope.cli", "extract", str(corpus), "-o", str(out), *WORDS, *words]


def extract(corpus: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(corpus, out, *words), capture_output=True, text=True, timeout=280, env=environment)


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


def test_a_killed_process_ends_the_run_and_nothing_is_lost(tmp_path: Path) -> None:
    from qwen_scope.cli import main

    corpus, two = tmp_path / "c.jsonl", tmp_path / "two"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in [*stores.ROWS * 20, {"other": 1}]))
    begun = time.monotonic()
    running = subprocess.Popen(
        command(corpus, two, "--on", "torchrun"), env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        while len(list((two / "work").glob("window-*.json"))) < 2:
            assert running.poll() is None, "it ended before anything was written"
            assert time.monotonic() - begun < DEADLINE
            time.sleep(0.02)
        process = of_rank(running.pid, 1)
        assert process is not None
        os.kill(process, signal.SIGKILL)
        assert running.wait(DEADLINE), "the run ends, and says that it did"
    finally:
        running.kill()
        running.wait()
    assert not (two / "manifest.json").exists()
    kept = len(list((two / "work").glob("window-*.json")))
    assert kept >= 2
    # In one process from here on: how many there are decides nothing.
    assert main(["extract", str(corpus), "-o", str(two), *WORDS]) == 0
    assert main(["extract", str(corpus), "-o", str(tmp_path / "one"), *WORDS]) == 0
    same(two, tmp_path / "one")
    assert not (two / "work").exists()
