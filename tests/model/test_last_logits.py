"""The logits behind the last token are those of the whole forward pass, and no others are computed."""

from __future__ import annotations

import pytest
import torch

from qwen_scope import load_scope
from qwen_scope.model import last_logits
from qwen_scope.steer import Decoding, generate


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


def test_the_head_reads_packed_rows_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_scope("lab", dtype="bfloat16").model
    ids, head, strides = torch.arange(20, 32).reshape(2, 6), model.lm_head, []
    plain = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is head.weight:
            strides.append(x.stride())
        return plain(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        assert strides.pop()[0] != head.weight.shape[1], "the case is none: transformers packs the rows itself"
        last_logits(model, input_ids=ids)
        generate(
            model, load_scope("lab").tokenizer, ["Guten Morgen", "Hello there"], decoding=Decoding(max_new_tokens=2)
        )
    d = head.weight.shape[1]
    assert strides == [(d, d, 1)] * 3
    assert not head._forward_pre_hooks
