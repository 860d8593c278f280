"""Features and interventions on a model that somebody else's code runs, and models inside of others' objects."""

from __future__ import annotations

from typing import Any, cast

import pytest
import tiny
import torch
from torch import nn

from qwen_scope import Intervention, load_scope
from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.model import blocks, tokenizer_of, unwrapped
from qwen_scope.scope import Scope
from qwen_scope.steer import Decoding, steering

TEXT = "[12:30] Anna: Guten Morgen, wo ist der"
MORE = Intervention.add(layer=4, feature=283, amount=0.3, unit="resid_norm")


@pytest.fixture(scope="module")
def scope() -> Scope:
    return load_scope("lab", device="cpu")


def test_features_come_out_and_interventions_go_in(scope: Scope) -> None:
    tokens = scope.tokenize([TEXT])
    with torch.no_grad(), scope.hooks(scope.model, layers="2,4") as found:
        plain = scope.model(tokens.input_ids).logits
    seen = scope.features(TEXT, [2, 4])
    for layer in (2, 4):
        assert torch.equal(found[layer].to_dense()[0], seen.of(0, layer).to_dense())
    with torch.no_grad(), scope.hooks(interventions=MORE, layers=5) as changed:
        steered = scope.model(tokens.input_ids).logits
    with torch.no_grad(), steering(scope.model, [MORE], scope.saes, scope.stats):
        assert torch.equal(scope.model(tokens.input_ids).logits, steered)
    assert not torch.equal(plain, steered)
    assert not torch.equal(changed[5].to_dense()[0], scope.features(TEXT, 5).of(0, 5).to_dense()), "under the change"
    with torch.no_grad():
        assert torch.equal(scope.model(tokens.input_ids).logits, plain), "no hook remains"


def test_generation_keeps_each_pass(scope: Scope) -> None:
    ids, generate = scope.tokenize([TEXT]).input_ids, cast("Any", scope.model).generate
    with torch.no_grad(), scope.hooks(interventions=[MORE], layers=4) as found:
        out = generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = scope.generate(TEXT, MORE, decoding=Decoding(max_new_tokens=3))
    assert scope.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == expected.text
    assert [one.indices.shape[1] for one in found.passes[4]][:2] == [ids.shape[1], 1]
    assert "passes" in repr(found)
    found.clear()
    with pytest.raises(InputError, match="has not run inside of the block yet"):
        found[4]
    with pytest.raises(NotFoundError, match="layer 3 is not read here; layers= gives 4"):
        found[3]


def test_a_model_of_another_size(scope: Scope) -> None:
    other = load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")
    said = r"this model has \d+ layers of \d+ dimensions, the scope's model 6"
    with pytest.raises(MismatchError, match=said), scope.hooks(other.model):
        pass


def test_the_model_inside_of_other_libraries_objects(scope: Scope) -> None:
    """By the names of their classes; the real ones run in tests/peers/check_hooks.py."""
    bridge: Any = type("TransformerBridge", (nn.Module,), {"__module__": "transformer_lens.model_bridge.bridge"})()
    bridge.original_model, bridge.tokenizer = scope.model, scope.tokenizer
    envoy = type("Envoy", (), {"__module__": "nnsight.intervention.envoy"})
    model: Any = type("LanguageModel", (envoy,), {"__module__": "nnsight.modeling.language"})()
    model._module, model.tokenizer = scope.model, scope.tokenizer
    for one in (bridge, model):
        assert unwrapped(one) is scope.model
        assert tokenizer_of(one) is scope.tokenizer
        opened = load_scope(one, "lab")
        assert opened.model is scope.model
        assert opened.name == scope.name
    assert unwrapped(scope.model) is scope.model
    assert tokenizer_of(scope.model) is None
    assert len(blocks(unwrapped(bridge))) == scope.n_layers
