"""Small storms; the large ones are the commands `storm_of_kills.py --kills 60` and `storm_of_files.py --count 300`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "size"),
    [("storm_of_kills.py", ["--kills", "7", "--seed", "1"]), ("storm_of_files.py", ["--count", "60", "--seed", "1"])],
)
def test_a_small_storm(script: str, size: list[str]) -> None:
    # In a process of its own: both fork, which threads that other tests have started would not survive.
    done = subprocess.run([sys.executable, HERE / script, *size], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
