"""An interrupt while `label` waits for a slow endpoint: one word, at once, nothing half-written, a rerun goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import lab_store
import pytest
from lab_store import LAYER
from test_labels import busy, serving

from qwen_scope.cli import main
from qwen_scope.features import Notes
from qwen_scope.store import FeatureStore

SLOW = 20.0
"""Seconds that the endpoint takes once it has become slow."""


def labels(folder: Path) -> dict[tuple[int, int], str]:
    with FeatureStore(folder) as store:
        return {place: one.text for place, one in Notes(store).labels().items()}


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 5])
def test_label_is_interrupted_and_goes_on(after: int, tmp_path: Path, capsys, monkeypatch) -> None:
    for name, value in (("OPENAI_MODEL", "judge"), ("OPENAI_API_KEY", "k")):
        monkeypatch.setenv(name, value)
    folder, clean = (lab_store.copied(tmp_path / name) for name in ("stopped", "clean"))
    with FeatureStore(clean) as store:
        features = ",".join(f"{LAYER}/{feature}" for feature in busy(store, 3))
    words = ["-f", features, "--examples", "6", "--tests", "6", "--concurrency", "2", "--json"]
    over, struck = threading.Event(), []
    with serving() as (server, url):
        monkeypatch.setenv("OPENAI_BASE_URL", url)

        def slow(_: object) -> None:
            if len(server.seen) >= after and not over.is_set():
                if not struck:
                    struck.append(time.monotonic())
                    os.kill(os.getpid(), signal.SIGINT)
                over.wait(SLOW)

        server.content = slow
        code = main(["label", str(folder), *words])
        took = time.monotonic() - struck[0]
        over.set()
        out, err = capsys.readouterr()
        assert (code, out) == (130, "")
        assert err.splitlines()[-1] == "qwen-scope: interrupted"
        assert "Traceback" not in err
        assert took < SLOW / 2
        held = labels(folder)
        assert len(held) < 3
        notes = folder / "notes.jsonl"
        assert all(json.loads(line) for line in (notes.read_text().split("\n") if notes.exists() else []) if line)

        asked = len(server.seen)
        assert main(["label", str(folder), *words]) == 0
        again = len(server.seen) - asked
        assert main(["label", str(clean), *words]) == 0
        assert again <= len(server.seen) - asked - again
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name]
    assert held.items() <= labels(folder).items()
    assert labels(folder) == labels(clean)
    assert len(labels(clean)) == 3
