"""The Python of docs/serve.md runs as it stands there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import served  # noqa: F401  # sets the environment that vLLM reads when it is imported

ROOT = Path(__file__).parents[3]


def test_the_python_of_the_guide_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    exec(compile(code, "docs/serve.md", "exec"), {"__name__": "guide"})
    said = capsys.readouterr().out
    assert "'5': {'positions': [" in said
