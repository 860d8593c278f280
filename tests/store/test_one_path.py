"""One path from text to features: the same document gives the same tokens and features wherever it is read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_scope import load_scope
from qwen_scope.model import LoadedModel
from qwen_scope.scope import ExtractOptions, extract
from qwen_scope.text import PHASES, Corpus, Counted, TokenRows, chunks

LAYER, CONTEXT = 2, 512
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "Wo ist der Bahnhof?"}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "plain": {"text": "The weather is fine today. 你好 🙂 e\u0301 \u200d\r\n x"},
    "prompt": {"text": [USER]},
    "finished": {"text": [USER, {"role": "assistant", "content": "Dort."}]},
    "thinking": {"text": [USER, {"role": "assistant", "reasoning_content": "Hm.", "content": "Dort."}]},
    "several turns": {
        "text": [
            {"role": "system", "content": "Be kind."},
            USER,
            {"role": "assistant", "reasoning_content": "Hm.", "content": "Dort."},
            {"role": "user", "content": "Danke 🇩🇪 عربى"},
        ]
    },
    "tools": {
        "text": [
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3."},
        ],
        "tools": TOOLS,
    },
}


def templates() -> dict[str, str]:
    """The lab's own template, and those of Qwen's models in TRL's wheel."""
    spec = find_spec("trl")
    folder = Path(spec.origin or "").parent / "chat_templates" if spec else Path("absent")
    wanted = ("qwen2_5", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8")
    return {"the lab's": ""} | {name: (folder / f"{name}.jinja").read_text() for name in wanted if folder.is_dir()}


TEMPLATES = templates()


@pytest.fixture(scope="module")
def scope():
    return load_scope("lab", device="cpu")


@pytest.fixture(autouse=True)
def own_template(scope):
    before = scope.tokenizer.chat_template
    yield
    scope.tokenizer.chat_template = before


def plain(scope, ids: list[int]) -> torch.Tensor:
    """Features of some tokens through transformers' own hidden states, `(tokens, d_sae)`."""
    h = scope.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
    return scope.saes[LAYER].encode(h).to_dense()


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_tokens_phases_and_features_are_the_same_on_every_way(scope, tmp_path, kind: str, template: str) -> None:
    row = DOCUMENTS[kind]
    if kind == "tools" and template == "the lab's":
        pytest.skip("the lab's template writes no tool calls")
    if TEMPLATES[template]:
        scope.tokenizer.chat_template = TEMPLATES[template]
    chat = None if isinstance(row["text"], str) else "default"
    (document,) = Corpus([row])

    parts = list(chunks(scope.tokenizer, document, chat=chat, phases=True))
    ids = [i for part in parts for i in part.ids]
    phases = np.concatenate([part.phases for part in parts if part.phases is not None])
    # Independent of the package: the template and the tokenizer of transformers.
    text = row["text"]
    if chat is not None:
        text = scope.tokenizer.apply_chat_template(
            document.text,
            tools=row.get("tools"),
            tokenize=False,
            add_generation_prompt=document.text[-1]["role"] != "assistant",
        )
    assert ids == scope.tokenizer(text, add_special_tokens=chat is None)["input_ids"]

    packed = TokenRows(Corpus([row] * 2), scope.tokenizer, context_length=len(ids) + 1, batch_size=1, chat=chat)
    assert [rows[0, :-1].tolist() for rows in packed] == [ids, ids]

    if not row.get("tools"):  # a text given by itself has no column of tools
        seen = scope.features([document.text], [LAYER], chat=chat)
        assert seen.input_ids[0].tolist() == ids
        assert seen.phases(0) == [PHASES[i] for i in phases]
        dense = seen.of(0, LAYER).to_dense()
    else:
        dense = torch.cat([plain(scope, ids[i : i + CONTEXT]) for i in range(0, len(ids), CONTEXT)])

    loaded = LoadedModel(scope.model, scope.tokenizer, "lab")
    saes = {LAYER: scope.saes[LAYER]}
    everything = ExtractOptions(chat=chat, counted=Counted.everything())
    with extract(Corpus([row]), loaded, saes, tmp_path / "s", everything) as store:
        spans = store.sql("SELECT phase, tokens FROM spans ORDER BY position").to_pylist()
        assert [span["phase"] for span in spans for _ in range(span["tokens"])] == [PHASES[i] for i in phases]
        assert store.sql("SELECT token FROM tokens ORDER BY position")["token"].to_pylist() == ids
        found = torch.zeros_like(dense)
        for fired in store.sql("SELECT position, feature, value FROM activations").to_pylist():
            found[fired["position"], fired["feature"]] = fired["value"]
    torch.testing.assert_close(found, dense.float(), rtol=1e-4, atol=1e-4)
