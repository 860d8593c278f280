"""Models whose numbers are not finite end in one sentence that names the layer and what to do, never in tokens."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch

from qwen_scope import Scope
from qwen_scope.cli import main
from qwen_scope.errors import InputError, QwenScopeError
from qwen_scope.model import LoadedModel, blocks
from qwen_scope.scope import SAEs
from qwen_scope.steer import Decoding, Intervention

TEXT = "The weather is fine today."
FEW = Decoding(3)


def broken(scope: Scope, layer: int, bad: float) -> Scope:
    """The scope with one weight of one layer's MLP replaced."""
    model = copy.deepcopy(scope.model)
    with torch.no_grad():
        blocks(model)[layer].mlp.down_proj.weight[3, 4] = bad  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    saes = SAEs(str(tiny.folder() / "sae"), d_model=tiny.D_MODEL)
    return Scope(LoadedModel(model, scope.tokenizer, scope.name), saes)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_generate_names_the_first_bad_layer(scope: Scope, layer: int, bad: float) -> None:
    one = broken(scope, layer, bad)
    for prompts in (TEXT, [TEXT, "a much longer prompt than the first one"]):
        with pytest.raises(InputError, match=rf"the residual after layer {layer} .*dtype bfloat16 or float32"):
            one.generate(prompts, decoding=FEW)
    assert not any(module._forward_hooks for module in one.model.modules())


@pytest.mark.parametrize("sample", [False, True])
def test_steering_and_sampling_too(scope: Scope, sample: bool) -> None:
    one = broken(scope, 1, math.nan)
    for op in (Intervention.add, Intervention.clamp):
        with pytest.raises(InputError, match=r"NaN or infinity.*bfloat16 or float32"):
            one.generate(TEXT, [op(layer=2, feature=3, amount=1.0)], decoding=Decoding(3, sample=sample))


@pytest.mark.parametrize("call", ["features", "compare", "stats"])
def test_reading_features_names_the_place(scope: Scope, call: str) -> None:
    one = broken(scope, 1, math.nan)
    calls = {
        "features": lambda: one.features([TEXT]),
        "compare": lambda: one.compare(TEXT, "b"),
        "stats": lambda: one.stats[2],
    }
    with pytest.raises(QwenScopeError, match=r"at layers\.[12]\.resid_post.*bfloat16 or float32") as caught:
        calls[call]()
    assert "\n" not in str(caught.value)


def test_a_damaged_head_is_told_from_a_damaged_layer(scope: Scope) -> None:
    one = broken(scope, 0, 1.0)
    with torch.no_grad():
        one.model.model.norm.weight[0] = math.nan
    with pytest.raises(InputError, match="what the model makes of its last residual holds NaN or infinity"):
        one.generate(TEXT, decoding=FEW)


def test_float16_that_overflows_says_which_type(scope: Scope) -> None:
    one = broken(scope, 1, 1.0)
    one.model.half()
    with torch.no_grad():
        blocks(one.model)[1].mlp.down_proj.weight.fill_(6e4)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        blocks(one.model)[1].mlp.up_proj.weight.fill_(6e3)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    with pytest.raises(InputError, match=r"after layer 1 holds NaN or infinity.* loaded in float16"):
        one.generate(TEXT, decoding=FEW)


def test_a_change_that_overflows_is_told_from_a_model_that_does(scope: Scope) -> None:
    one = broken(scope, 1, 0.1)
    one.model.half()
    one_push = [60_000.0] * tiny.D_MODEL
    pushes = [Intervention.add(layer=layer, direction=one_push, amount=1.0) for layer in (0, 2)]
    before = one.generate(TEXT, decoding=FEW)
    with pytest.raises(InputError, match=r"makes the model's numbers overflow float16, first after layer 2; lower the"):
        one.generate(TEXT, pushes, decoding=FEW)
    assert one.generate(TEXT, decoding=FEW) == before


def test_tokens_that_are_ruled_out_are_no_fault(scope: Scope) -> None:
    one = broken(scope, 1, 0.1)
    plain = one.generate(TEXT, decoding=FEW)
    head = one.model.get_output_embeddings()
    assert head is not None
    likeliest = plain.tokens[0].token_id

    def rule_out(_, __, logits):
        logits = logits.clone()
        logits[..., likeliest] = -math.inf
        return logits

    handle = head.register_forward_hook(rule_out)
    again = one.generate(TEXT, decoding=FEW)
    handle.remove()
    assert again.tokens[0].token_id != likeliest


@pytest.mark.slow
def test_the_command_line_ends_in_one_sentence(scope: Scope, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    one = broken(scope, 1, math.inf)
    one.model.save_pretrained(tmp_path / "model")
    one.tokenizer.save_pretrained(tmp_path / "model")
    where = ["--model", str(tmp_path / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]
    for argv in (
        ["steer", TEXT, *where, "--feature", "0/3", "--amount", "1", "--max-new-tokens", "3", "--unit", "raw"],
        ["features", TEXT, *where],
        ["compare", TEXT, "b", *where],
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "bfloat16 or float32" in err
