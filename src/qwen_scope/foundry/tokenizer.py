"""A byte-level BPE tokenizer of Qwen's kind, small enough for the lab."""

from __future__ import annotations

import json
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

# Qwen's control tokens that the lab's texts use; the think tags are ordinary added tokens there, and here too.
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")

# What Qwen3's template does for plain chats: `enable_thinking=False` writes an empty think block for the answer.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}"""


def make_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerBase:
    """A tokenizer with `vocab_size` entries in all, learnt from `texts`. Like Qwen's, it adds no BOS."""
    from tokenizers.trainers import BpeTrainer

    blank = Qwen2Tokenizer(vocab={}, merges=[])
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(CONTROL) - len(THINK),
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    core = blank._tokenizer
    core.train_from_iterator(texts, trainer)
    learnt = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],  # pyright: ignore[reportArgumentType] - its hint is narrow
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(CONTROL),
        model_max_length=context,
    )
    tokenizer.add_tokens(list(THINK))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses for bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a token that the vocabulary has by this name."""
    found = tokenizer.get_vocab()[token]
    return int(found)
