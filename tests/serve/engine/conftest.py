"""One engine for a file of tests; the toolkit's own answers, from the file that run.sh has written."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # model runner V2 runs in it, and Triton asks when it is first imported

import cases
import pytest


@pytest.fixture(scope="session")
def known() -> dict[str, Any]:
    return cases.read(os.environ["QWEN_SCOPE_CASES"])
