"""A token by itself shows what a person can read: no letters that stand for bytes, no replacement character."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen_scope.scope import model_source
from qwen_scope.text import token_text

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def byte_level(text: str, start: int, end: int) -> str:
    """What is shown of the token that bytes `[start, end)` of a text are in a vocabulary such as Qwen's."""
    name = BYTES.pre_tokenize_str(text)[0][0][start:end]  # a letter for each byte
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([name, *sorted(BYTES.alphabet())]))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.decoder = decoders.ByteLevel()
    return token_text(PreTrainedTokenizerFast(tokenizer_object=made), 0)


def fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: spaces as a letter, dropped at the start of a text, bytes for what is unknown."""
    pieces = ["<unk>", "▁", "▁the", "the", "か", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [], "byte_fallback": True}
    made = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize(
    ("text", "start", "end", "shown"),
    [
        ("しの", 0, 1, "<0xE3>"),
        ("しの", 0, 5, "し<0xE3><0x81>"),
        ("しの a", 5, 8, "<0xAE> a"),
        ("しの", 3, 6, "の"),
        (" the", 0, 4, " the"),
        ("é", 0, 2, "é"),
        ("🦀", 1, 3, "<0x9F><0xA6>"),
        ("\N{REPLACEMENT CHARACTER}", 0, 3, "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_pieces_of_characters_show_whole_ones_and_the_numbers_of_bytes(
    text: str, start: int, end: int, shown: str
) -> None:
    assert byte_level(text, start, end) == shown


def test_a_vocabulary_with_byte_fallback_keeps_its_names_and_its_spaces() -> None:
    tokenizer = fallback()
    said = [token_text(tokenizer, i) for i in range(5)]
    assert said == ["<unk>", " ", " the", "the", "か"]
    names = {piece: i for piece, i in tokenizer.get_vocab().items() if piece.startswith("<0x")}
    assert token_text(tokenizer, names["<0xE3>"]) == "<0xE3>"
    assert token_text(tokenizer, names["<0x41>"]) == "A"


def test_the_lab_s_whole_vocabulary_reads_well() -> None:
    """Every byte of it: what is shown says each token's bytes and nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(model_source("lab"))
    for token in range(len(tokenizer)):
        shown = token_text(tokenizer, token)
        assert shown
        assert "\N{REPLACEMENT CHARACTER}" not in shown
        decoded = tokenizer.decode([token])
        if "\N{REPLACEMENT CHARACTER}" not in decoded:
            assert shown == decoded
        else:
            assert "<0x" in shown
