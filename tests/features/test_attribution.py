"""Attribution against the gradients of plain hooks, and against what ablation really does."""

from __future__ import annotations

import lab_store
import pytest
import torch

from qwen_scope import Intervention
from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.features import attribute
from qwen_scope.lab import documents
from qwen_scope.steer import Row, log_probabilities

LAYERS = (1, 4)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    tokenizer = lab_store.scope().tokenizer
    return [tokenizer(one.text)["input_ids"][: 9 + 4 * i] for i, one in enumerate(documents(seed=8, n=4))]


def by_hooks(ids: list[int]) -> dict[int, torch.Tensor]:
    """a_f (d_f . grad) summed over tokens, from hooks of torch and dense activations."""
    scope, kept = lab_store.scope(), {}
    blocks = scope.model.model.layers
    hooks = [
        blocks[layer].register_forward_hook(lambda _, __, out, layer=layer: kept.__setitem__(layer, out))
        for layer in LAYERS
    ]
    embedded = scope.model.get_input_embeddings()(torch.tensor([ids[:-1]])).detach().requires_grad_()
    said = scope.model(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)[ids[-1]]
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(said, [kept[layer] for layer in LAYERS])
    out = {}
    for layer, gradient in zip(LAYERS, gradients, strict=True):
        sae = scope.saes[layer]
        dense = sae.encode(kept[layer][0].detach()).to_dense()
        out[layer] = (dense * (gradient[0] @ sae.W_dec.float())).sum(0)
    return out


def test_it_is_the_gradient_times_the_activation(sequences: list[list[int]]) -> None:
    found = attribute(lab_store.scope(), sequences, LAYERS)
    each = [by_hooks(ids) for ids in sequences]
    for layer in LAYERS:
        mean = torch.stack([one[layer] for one in each]).mean(0)
        torch.testing.assert_close(found[layer], mean, atol=1e-4, rtol=1e-3)
        assert mean.abs().max() > 0.01


def test_small_changes_do_what_it_says(sequences: list[list[int]]) -> None:
    scope, ids = lab_store.scope(), sequences[2]
    effects = attribute(scope, [ids], [4])[4]
    feature = int(effects.abs().argmax())
    rows = [Row(tuple(ids), len(ids) - 1)]

    def said(factor: float) -> float:
        change = Intervention.scale(layer=4, feature=feature, amount=factor)
        return float(log_probabilities(scope.model, rows, [change], scope.saes)[0][0])

    slope = (said(1.02) - said(0.98)) / 0.04
    assert slope == pytest.approx(float(effects[feature]), rel=0.1)


def test_nothing_is_left_behind(sequences: list[list[int]]) -> None:
    scope = lab_store.scope()
    attribute(scope, sequences[:1], [2])
    assert not any(block._forward_hooks for block in scope.model.model.layers)
    assert all(parameter.grad is None for parameter in scope.model.parameters())


def test_what_makes_no_sense_is_refused(sequences: list[list[int]]) -> None:
    scope = lab_store.scope()
    for bad in ([], [[1]], [sequences[0], []]):
        with pytest.raises(InputError, match="at least two tokens"):
            attribute(scope, bad)
    with pytest.raises(NotFoundError, match="no SAE"):
        attribute(scope, sequences[:1], [77])
