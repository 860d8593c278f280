"""Where each family keeps its parts, against paths and classes written down here by hand."""

import pytest
import torch
import transformers
from families import D_MODEL, FAMILIES, N_LAYERS, VOCAB
from torch import nn

from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.model import (
    block_path,
    blocks,
    context_length,
    d_model,
    decoder,
    final_norm,
    input_device,
    n_layers,
    text_config,
    unembedding,
)

BLOCKS = dict.fromkeys(FAMILIES, "model.layers")
BLOCKS |= dict.fromkeys(("qwen3_5", "qwen3_5_moe", "gemma3"), "model.language_model.layers")


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_where_the_family_keeps_them(family, name):
    model = family(name)
    home = BLOCKS[name].rpartition(".")[0]
    assert blocks(model) is model.get_submodule(BLOCKS[name])
    assert decoder(model) is model.get_submodule(home)
    assert final_norm(model) is model.get_submodule(f"{home}.norm")
    assert unembedding(model) is model.lm_head.weight
    assert block_path(model, 2) == f"{BLOCKS[name]}.2"
    assert dict(model.named_modules())[block_path(model, 2)] is blocks(model)[2]
    assert (d_model(model), n_layers(model), context_length(model)) == (D_MODEL, N_LAYERS, 128)
    assert text_config(model).vocab_size == VOCAB
    assert input_device(model) == torch.device("cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bare_decoder_will_do(family, name):
    bare = family(name).model
    assert blocks(bare) is blocks(family(name))
    assert block_path(bare, 0) == BLOCKS[name].removeprefix("model.") + ".0"
    if text_config(bare).tie_word_embeddings:
        assert unembedding(bare).shape == (VOCAB, D_MODEL)
    else:
        with pytest.raises(NotFoundError, match="no LM head"):
            unembedding(bare)


@pytest.mark.parametrize(
    ("cls", "config", "path", "norm"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4}, "transformer.h.1", "transformer.ln_f"),
        ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, "transformer.h.1", "transformer.ln_f"),
        (
            "OPTForCausalLM",
            {
                "hidden_size": 32,
                "word_embed_proj_dim": 32,
                "num_hidden_layers": 3,
                "ffn_dim": 32,
                "num_attention_heads": 4,
            },
            "model.decoder.layers.1",
            "model.decoder.final_layer_norm",
        ),
        (
            "CpmAntForCausalLM",  # its blocks stand one level below its embedding
            {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 32},
            "cpmant.encoder.layers.1",
            "cpmant.encoder.output_layernorm",
        ),
        (
            "IdeficsForVisionText2Text",  # two lists of blocks of one length: a row of FAMILIES says which
            {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 32, "num_attention_heads": 4},
            "model.layers.1",
            "model.norm",
        ),
    ],
)
def test_families_nobody_listed(cls, config, path, norm):
    model_class = getattr(transformers, cls)
    with torch.device("meta"):
        model = model_class(model_class.config_class(vocab_size=256, **config))
    assert block_path(model, 1) == path
    assert final_norm(model) is model.get_submodule(norm)
    assert decoder(model).get_input_embeddings() is model.get_input_embeddings()


class Adapted(nn.Module):
    """As PEFT wraps a model: two modules above it, unknown attributes passed on."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
def test_an_adapter_wrapper_is_looked_through(family, name):
    wrapped = Adapted(family(name))
    assert blocks(wrapped) is blocks(family(name))
    assert block_path(wrapped, 1) == f"base_model.model.{BLOCKS[name]}.1"
    assert decoder(wrapped) is decoder(family(name))


def test_expert_lists_are_not_blocks():
    model = FAMILIES["qwen3"]()
    for block in model.model.layers:
        block.mlp.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(N_LAYERS))
    assert blocks(model) is model.model.layers

    def unknown():
        raise NotImplementedError

    model.get_input_embeddings = unknown
    assert blocks(model) is model.model.layers


@pytest.mark.parametrize("layer", [-1, N_LAYERS, 99])
def test_a_layer_that_does_not_exist(qwen3, layer):
    with pytest.raises(NotFoundError, match=f"layer {layer} does not exist: Qwen3ForCausalLM has 4 layers, 0 to 3"):
        block_path(qwen3, layer)


def test_what_has_no_blocks_is_refused():
    with pytest.raises(InputError, match="no transformers config"):
        blocks(nn.Linear(2, 2))
    with torch.device("meta"):
        t5 = transformers.T5Model(transformers.T5Config(vocab_size=8, d_model=8, num_layers=1, d_ff=8))
    with pytest.raises(InputError, match="encoder-decoder"):
        blocks(t5)
    model = FAMILIES["qwen3"]()
    model.model.layers = model.model.layers[:2]
    with pytest.raises(NotFoundError, match="no list of 4 decoder blocks"):
        blocks(model)
    model = FAMILIES["qwen3"]()
    model.model.twins = nn.ModuleList(nn.Linear(4, 4) for _ in range(N_LAYERS))
    with pytest.raises(FormatError, match=r"several lists of 4 blocks: model\.layers, model\.twins"):
        blocks(model)


def test_a_model_spread_over_devices_starts_where_its_embedding_runs():
    model = FAMILIES["qwen3"]()
    model.model.embed_tokens._hf_hook = type("Hook", (), {"execution_device": "cuda:1"})()
    assert input_device(model) == torch.device("cuda", 1)
