"""The real models that `run.sh` fetched, and on the first of them an SAE trained as a user would."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODELS = [Path(path) for path in os.environ.get("QWEN_SCOPE_REAL_MODELS", "").split(":") if path]
LAYER, D_SAE, K = 8, 1024, 32

Ask = Callable[..., Any]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "gguf" in metafunc.fixturenames:
        assert MODELS, "QWEN_SCOPE_REAL_MODELS names no file; tests/real/run.sh fetches one"
        metafunc.parametrize("gguf", MODELS, ids=[path.stem for path in MODELS], scope="session")


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts from the help of Python itself, and with the model beside them."""
    smollm2 = [path for path in MODELS if path.stem == "smollm2-135m"]
    if not smollm2:
        pytest.skip("the figures of the commands are those of smollm2-135m")
    folder = tmp_path_factory.mktemp("real")
    (folder / "model.gguf").symlink_to(smollm2[0])
    paragraphs = [
        " ".join(paragraph.split())
        for _, topic in sorted(pydoc_data.topics.topics.items())
        for paragraph in re.split(r"\n\s*\n", topic)
    ]
    documents: list[str] = [""]
    for paragraph in paragraphs:
        documents[-1] += paragraph + "\n\n"
        if len(documents[-1]) > 1000:
            documents.append("")
    random.Random(0).shuffle(documents)
    documents = [document.strip() for document in documents if len(document) > 200]
    sessions = [one for one in paragraphs if ">>>" in one and 60 < len(one) < 400]
    prose = [one for one in paragraphs if ">>>" not in one and "::=" not in one and 100 < len(one) < 400]
    prose = [one for one in prose if one[0].isupper()]
    random.Random(0).shuffle(prose)
    for name, texts in {
        "train": documents[40:],
        "held": documents[:40],
        "sessions": sessions[:40],
        "prose": prose[:40],
        "prompts": [" ".join(one.split()[:4]) for one in prose[40:45]],
    }.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture(scope="session")
def ask(work: Path) -> Ask:
    """`ask("features", "a text", ...)` types a command and gives its JSON, of several lines a list."""

    def asked(*words: str | int | float, model: bool = True, lines: bool = False) -> Any:
        own = ["--model", "model.gguf", "--dtype", "float32"] if model else []
        sae = ["--sae", "run/tiny"] if model and words[0] != "train" else []
        done = subprocess.run(
            [sys.executable, "-m", "qwen_scope.cli", *map(str, words), *own, *sae],
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
        return [json.loads(line) for line in done.stdout.splitlines()] if lines else json.loads(done.stdout)

    return asked


@pytest.fixture(scope="session")
def trained(ask: Ask) -> dict[str, Any]:
    """What `train` says of an SAE of 32,768 tokens."""
    return ask(
        "train", "train.jsonl", "--layers", LAYER, "--d-sae", D_SAE, "--k", K, "--tokens", 2**15, "--batch", 512,
        "--eval-tokens", 1024, "--out", "run", "--group", "tiny", "--json",
    )  # fmt: skip
