"""A tiny model with random weights, its tokenizer, and random SAEs on disk: for tests that need shapes, not quality."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from qwen_scope.foundry import make_model, make_tokenizer
from qwen_scope.sae import Identity, TopK, save_sae

TEXTS = [
    "The weather is fine today. Where is the station?",
    "Guten Morgen! Wo ist der Bahnhof, bitte?",
    "你好，今天天气很好。车站在哪里？",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nhi<|im_end|>\n",
    "def add(a, b):\n    return a + b\n",
]
D_MODEL, D_SAE, N_LAYERS, K, CONTEXT = 32, 96, 3, 6, 64


@functools.cache
def folder() -> Path:
    """A folder with `model/` and `sae/` (layers 0 and 2 of three), made once per test process."""
    logging.disable_progress_bar()
    out = Path(tempfile.mkdtemp(prefix="qwen-scope-tiny-"))
    tokenizer = make_tokenizer(TEXTS * 20, 400, CONTEXT)
    model = make_model("dense", 512, D_MODEL, N_LAYERS, CONTEXT, eos_token_id=1, pad_token_id=0)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    for layer in (0, 2):
        save_sae(random_sae(layer), out / "sae")
    return out


def random_sae(layer: int = 0, d_model: int = D_MODEL, d_sae: int = D_SAE, k: int = K) -> TopK:
    """An SAE with Gaussian weights; the seed is the layer."""
    generator = torch.Generator().manual_seed(layer)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return TopK(
        W_enc=normal(d_sae, d_model),
        W_dec=normal(d_model, d_sae),
        b_enc=normal(d_sae) / 10,
        b_dec=normal(d_model),
        k=k,
        hook_point=f"layers.{layer}.resid_post",
        identity=Identity("SAE-Res-Tiny-W96-L0_6", layer, f"{layer:064x}"),
    )


def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """The same tokenizer, which puts a BOS before every text, with a chat template that writes one too."""
    core: Tokenizer = tokenizer.backend_tokenizer
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core.to_str()), bos_token="<bos>")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", fast.bos_token_id)]
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast
