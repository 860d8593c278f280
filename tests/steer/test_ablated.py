"""Ablated checkpoints: in every family the same logits as hooks written out by hand, and refusals by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
import transformers
from families import D_MODEL, FAMILIES, N_LAYERS, VOCAB
from torch import nn

from qwen_scope.errors import FormatError, InputError, MismatchError
from qwen_scope.model import HookPoint, blocks, capture, decoder
from qwen_scope.steer import Intervention, ablated, check_ablated, steering

NORMED = ("gemma2", "gemma3_text", "gemma3")
IDS = torch.arange(0, 240, 10)[None]


def direction(seed: int = 0) -> list[float]:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed)).tolist()


def everywhere(*directions: list[float], layers: int = N_LAYERS) -> list[Intervention]:
    return [Intervention.ablate(layer=layer, direction=one) for layer in range(layers) for one in directions]


def parts(*directions: list[float], layers: int = N_LAYERS) -> list[Intervention]:
    points = [HookPoint(layer, part) for layer in range(layers) for part in ("attn_out", "mlp_out")]
    return [Intervention.ablate(layer=point, direction=one) for point in points for one in directions]


def projector(*directions: list[float]) -> torch.Tensor:
    """`1 - D (D^T D)^-1 D^T` in float64, for the columns of D."""
    d = torch.tensor(directions, dtype=torch.float64).T
    return (torch.eye(len(d), dtype=torch.float64) - d @ torch.linalg.inv(d.T @ d) @ d.T).float()


@contextmanager
def projected(model: nn.Module, gone: torch.Tensor) -> Iterator[None]:
    """Every write to the stream projected by a plain forward hook: the embedding, and both parts of every block."""

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (output[0] @ gone, *output[1:])
        return output @ gone

    written = [decoder(model).get_input_embeddings()]
    for block in blocks(model):
        children = dict(block.named_children())
        written += [children[name] for name in ("self_attn", "linear_attn", "mlp") if name in children]
    assert len(written) == 1 + 2 * len(blocks(model))
    with ExitStack() as stack:
        for module in written:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NORMED])
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_model_whose_writes_are_projected(family, tied, tmp_path) -> None:
    model = FAMILIES[family]()
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
    model.tie_weights()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with projected(model, projector(direction(), direction(2))):
            wanted = model(input_ids=IDS).logits
        made = ablated(model, everywhere(direction(), direction(2)))
        torch.testing.assert_close(made(input_ids=IDS).logits, wanted, atol=1e-4, rtol=0)
        assert (plain - wanted).abs().max() > 0.05, "the direction matters"
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        # and it is an ordinary folder, whatever the original shared
        made.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=1e-4, rtol=0)
        for h in capture(again, IDS, [HookPoint(layer) for layer in range(N_LAYERS)]).values():
            assert (h @ torch.tensor(direction())).abs().max() < 1e-4 * h.norm(dim=-1).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_lose_what_the_same_recipe_takes_from_them(family) -> None:
    model = FAMILIES[family]()
    recipe = parts(direction(), layers=2)
    with torch.no_grad():
        with steering(model, recipe):
            wanted = model(input_ids=IDS).logits
        torch.testing.assert_close(ablated(model, recipe)(input_ids=IDS).logits, wanted, atol=1e-4, rtol=0)
        assert (model(input_ids=IDS).logits - wanted).abs().max() > 0.05


def test_biases_and_transposed_experts() -> None:
    config = transformers.GptOssConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=D_MODEL, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(config).eval()
        for name, value in model.named_parameters():
            if "bias" in name:
                nn.init.normal_(value, std=0.2)
    with torch.no_grad(), projected(model, projector(direction())):
        wanted = model(input_ids=IDS).logits
    made = ablated(model, everywhere(direction(), layers=2))
    torch.testing.assert_close(made(input_ids=IDS).logits, wanted, atol=1e-4, rtol=0)


def test_gemma_1_scales_its_embedding_and_norms_no_write() -> None:
    config = transformers.GemmaConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GemmaForCausalLM(config).eval()
    with torch.no_grad(), projected(model, projector(direction())):
        wanted = model(input_ids=IDS).logits
    made = ablated(model, everywhere(direction(), layers=2))
    torch.testing.assert_close(made(input_ids=IDS).logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", NORMED)
def test_families_that_norm_what_is_written_are_refused(family) -> None:
    with pytest.raises(InputError, match="norms what attention and MLP write before it is added"):
        ablated(FAMILIES[family](), everywhere(direction()))


def test_other_weights_that_write_are_found_out() -> None:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=D_MODEL, n_layer=2, n_head=4, n_positions=128)
    model = transformers.GPT2LMHeadModel(config).eval()  # its embedding of positions writes too
    with pytest.raises(FormatError, match="still holds"):
        ablated(model, everywhere(direction(), layers=2))


def test_half_precision_loses_it_too() -> None:
    model = FAMILIES["qwen3"]().bfloat16()
    made = ablated(model, everywhere(direction()))
    assert made.dtype == torch.bfloat16
    unit = torch.tensor(direction()) / torch.tensor(direction()).norm()
    for name, value in made.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert (unit @ value.float()).abs().max() < 0.01 * value.float().norm(dim=0).max()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ([Intervention.ablate(layer=2, feature=17)], "ablate of feature 2/17 at layers.2.resid_post: that depends on"),
        ([Intervention.add(layer=2, direction=direction(), amount=1.0)], "add of a direction .* can only lose"),
        ([Intervention.clamp(layer=1, feature=3, amount=1.0)], "clamp of feature 1/3"),
        (everywhere(direction())[:-1], r"layers 3 are left out; ablate the same directions at layers 0 to 3"),
        ([*everywhere(direction())[:-1], Intervention.ablate(layer=3, direction=direction(1))], "different ones"),
        ([Intervention.ablate(layer=0, direction=direction(), where="prompt")], "the same at all tokens, not only at"),
        ([Intervention.ablate(layer=0, direction=direction(), amount=0.5)], "not by a share of 0.5"),
        ([*everywhere(direction()), *parts(direction())], "leave attn_out and mlp_out away"),
    ],
)
def test_what_weights_can_not_express_is_named(recipe, says) -> None:
    with pytest.raises(InputError, match=f"an ablated checkpoint can't express the .*{says}"):
        ablated(FAMILIES["qwen3"](), recipe)


def test_a_direction_of_another_width() -> None:
    with pytest.raises(MismatchError, match="3 numbers does not fit a residual of 32"):
        ablated(FAMILIES["qwen3"](), everywhere([1.0, 0.0, 2.0]))
    check_ablated(everywhere(direction()))


@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "model.embed_tokens"])
def test_packed_weights_are_refused(place) -> None:
    model = FAMILIES["qwen3"]()
    module = model.get_submodule(place)
    packed = module.weight.data
    del module.weight
    module.register_buffer("weight", packed)  # as the blocks of a GGUF are held
    with pytest.raises(InputError, match=r"weight is packed.*a GGUF with dtype float32"):
        ablated(model, everywhere(direction()))
