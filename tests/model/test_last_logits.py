"""The logits behind the last token are those of the whole forward pass, and no others are computed."""

from __future__ import annotations

import torch

from qwen_scope import load_scope
from qwen_scope.model import last_logits


def test_only_the_last_token_is_read_out() -> None:
    model = load_scope("lab").model
    ids = torch.arange(20, 32).reshape(2, 6)
    with torch.no_grad():
        every = model(input_ids=ids, use_cache=False).logits[:, -1]
        shapes: list[tuple[int, ...]] = []
        hook = model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
        found = last_logits(model, input_ids=ids)
        embedded = last_logits(model, inputs_embeds=model.get_input_embeddings()(ids))
        hook.remove()
    torch.testing.assert_close(found, every)
    torch.testing.assert_close(embedded, every)
    assert shapes == [(2, 1, every.shape[-1])] * 2


def test_a_model_that_can_only_give_all_is_read_as_well() -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> object:
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids, 9).float()})

    assert last_logits(Plain(), input_ids=torch.tensor([[1, 2, 3]])).argmax(-1).tolist() == [3]
