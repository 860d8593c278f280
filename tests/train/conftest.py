"""A tiny random language model with a tokenizer, made once per session: enough to run every path, no download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "his", "house", "and", "she", "saw", "it", "rain",
]  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"


def sentences(n: int, seed: int = 0) -> list[str]:
    """`n` random sentences of 3 to 20 words."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 21, (n,), generator=g).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (k,), generator=g).tolist()) for k in lengths]


def make_model(folder: Path, seed: int = 0, d_model: int = 32, n_layers: int = 3) -> Path:
    """Save a random Qwen3 with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = ["<unk>", "</s>", "<user>", "<assistant>", *WORDS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=d_model, intermediate_size=64, num_hidden_layers=n_layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def loaded(model_folder: Path):
    from qwen_scope.model import load_model

    return load_model(model_folder, device="cpu")
