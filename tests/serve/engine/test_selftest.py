"""A server whose changes are not felt ends at its start, in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import http_server

# A plugin of vLLM beside ours, in every process of the server: no step is told which request wants what.
PLUGIN = """
def register():
    from qwen_scope.serve import WorkerState

    WorkerState.begin = lambda self, *step: None
"""


def test_a_server_that_does_not_steer_does_not_start(tmp_path: Path) -> None:
    made = tmp_path / "site" / "unsteered-1.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: unsteered\nVersion: 1\n")
    (made / "entry_points.txt").write_text("[vllm.general_plugins]\nunsteered = unsteered:register\n")
    (made.parent / "unsteered.py").write_text(PLUGIN)
    env = {
        "PYTHONPATH": f"{made.parent}:{os.environ['PYTHONPATH']}",
        "VLLM_PLUGINS": "qwen_scope,unsteered",
    }
    with http_server.process(tmp_path, env) as (started, url, log):
        assert started.wait(http_server.PATIENCE) == 1
        assert not http_server.up(url)
        said = [line for line in log.read_text().splitlines() if "the self-test of serving failed" in line]
    assert len(said) == 1
    assert said[0].endswith(
        "qwen-scope: the self-test of serving failed: add at layer 0 left the log-probabilities as they were, so"
        " answers would go out unsteered"
    )
