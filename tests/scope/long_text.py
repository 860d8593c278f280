"""The peak of memory that a text of N tokens takes beside the weights, in bytes: `features | extract N FOLDER [MODEL]`.

Without a model (a folder or a GGUF file) one with random weights of Qwen3's kind is made: two layers, 151,936 tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from qwen_scope.model import LoadedModel, d_model, load_model, n_layers
from qwen_scope.sae import Identity, TopK, save_sae
from qwen_scope.scope import ExtractOptions, SAEs, Scope
from qwen_scope.text import Counted

D_SAE, K = 512, 8


def random_model() -> LoadedModel:
    """Two layers with random weights, and a tokenizer of few tokens."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2**17,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel(model, AutoTokenizer.from_pretrained(tiny.folder() / "model"), "random")


def now(what: str) -> int:
    """A figure of this process; getrusage would also count what the process that started it had."""
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0]) * 1024


def main(way: str, tokens: int, work: Path, model: str | None = None) -> None:
    """Read a text of so many tokens and print what that took."""
    loaded = random_model() if model is None else load_model(model, device="cpu", dtype="auto")
    width, layer = d_model(loaded.model), n_layers(loaded.model) - 1
    matrices = torch.randn(D_SAE, width), torch.randn(width, D_SAE)
    biases = torch.zeros(D_SAE), torch.zeros(width)
    sae = TopK(*matrices, *biases, k=K, identity=Identity("random", layer, "0" * 64))
    save_sae(sae, work / "sae")
    scope = Scope(loaded, SAEs(str(work / "sae"), d_model=width), Counted())
    words = " the station is in the city" * tokens
    ids = loaded.tokenizer(words, return_offsets_mapping=True, verbose=False)
    text = words[: ids["offset_mapping"][tokens - 1][1]]
    scope.features([text[:1000]])  # what libraries take once
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, which loading may have made
    before = now("VmRSS")
    if way == "features":
        seen = scope.features([text])
        assert seen.acts[layer].indices.shape[1] == tokens
    else:
        with scope.extract([text], work / "store", ExtractOptions(counted=Counted())) as store:
            assert store.manifest.tokens == tokens
    print(now("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
