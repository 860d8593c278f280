"""A tokenizer of Qwen's kind with every template of TRL's wheel."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def templates() -> dict[str, str]:
    """The chat templates of TRL's wheel by name; none without TRL."""
    spec = find_spec("trl")
    folder = Path(spec.origin or "").parent / "chat_templates" if spec else Path("absent")
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


TEMPLATES = templates()
QWEN = [name for name in TEMPLATES if name.startswith("qwen")]
REASONS = [name for name in QWEN if not name.startswith(("qwen2_5", "qwen3_vl", "qwen3_instruct"))]
CALLS = [name for name in QWEN if "qwen2_5_vl" not in name]
FAST = {"qwen2_5", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast part of the tests takes one template of each generation of Qwen."""
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        template = params.get("template", "qwen3")
        if item.path.parent == Path(__file__).parent and isinstance(template, str) and template not in FAST:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def _tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder() / "model")
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.add_special_tokens({"bos_token": "<BOS>"})
    return tokenizer


@pytest.fixture
def tokenizer(_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`<think>` and `<tool_call>` are one token each, as in Qwen's; the template is the lab's."""
    _tokenizer.chat_template = (
        json.loads((tiny.folder() / "model" / "tokenizer_config.json").read_text()).get("chat_template")
        or (tiny.folder() / "model" / "chat_template.jinja").read_text()
    )
    return _tokenizer
