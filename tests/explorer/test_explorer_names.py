"""What the page calls features, how texts are put to a model, and which layers stores share."""

from __future__ import annotations

from pathlib import Path

import explored
import pytest

from qwen_scope import load_scope
from qwen_scope.errors import InputError
from qwen_scope.explorer import AppState
from qwen_scope.features import labels_of, promoted_tokens
from qwen_scope.model import LoadedModel
from qwen_scope.scope import extract
from qwen_scope.text import Corpus


def test_a_feature_is_called_by_its_label_else_by_what_it_promotes(state: AppState) -> None:
    labels = labels_of(state.scope)
    named = next(i for i in range(2048) if labels(3, i) is not None)
    bare = next(i for i in range(2048) if labels(3, i) is None)
    label, found = labels(3, named), state.label(3, named)
    assert label is not None
    assert found is not None
    assert (found.text, found.score) == (label.shown, label.score)
    fresh = AppState(state.scope)
    assert fresh.label(3, bare) is None
    fresh.names.learn(3, [named, bare, bare])
    shown = fresh.label(3, bare)
    assert shown is not None
    assert shown.score is None
    (words,) = promoted_tokens(state.scope, 3, [bare], 3)
    assert all(word.strip() in shown.text for word in words)
    page = state.feature_page(3, named)
    assert page.label == label


def test_texts_are_put_to_a_model_as_far_as_its_template_goes() -> None:
    scope = load_scope("lab", device="cpu")
    assert [name for _, name in AppState(scope).chats] == ["plain", "thinking", "non_thinking"]
    scope.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    plain = AppState(scope)
    assert plain.chats == [("Plain text", "plain"), ("Chat", "default")]
    assert plain.seen("Hello", 0, "default").tokens[0][0] == "<|im_start|>"
    scope.tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert [name for _, name in AppState(scope).chats] == ["plain"]
    scope.tokenizer.chat_template = None
    assert [name for _, name in AppState(scope).chats] == ["plain"]


def test_stores_share_layers(tmp_path: Path) -> None:
    scope = load_scope("lab", device="cpu")
    loaded = LoadedModel(scope.model, scope.tokenizer, scope.name)
    for name, layers in (("a", (1, 4)), ("b", (2, 4)), ("c", (2,))):
        saes = {layer: scope.saes[layer] for layer in layers}
        extract(Corpus(explored.ENGLISH, name=name), loaded, saes, tmp_path / name).close()
    state = AppState(scope, {name: tmp_path / name for name in "abc"})
    assert state.common_layers(["a"]) == [1, 4]
    assert state.common_layers(["a", "b"]) == [4]
    assert state.common_layers(["a", "c"]) == state.common_layers([]) == []
    with pytest.raises(InputError, match="there is no store"):
        state.common_layers(["/etc"])
