"""Long texts come out as the whole would, whatever kind of tokenizer reads them."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable

import pytest
from test_chunks import GAPS, WORDS, together
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qwen_scope.lab import documents
from qwen_scope.text import tokenize

TEXT = "\n".join(document.text for document in documents(seed=3, n=60)) + "".join(WORDS) + "abababab aaaa 0123456789"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>"]
BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
BOTH = processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
)


def trained(model: models.Model, normalizer: object = None, split: object = None, post: object = BOS) -> Tokenizer:
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer  # type: ignore[assignment]
    if split is not None:
        made.pre_tokenizer = split  # type: ignore[assignment]
    options = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    if isinstance(model, models.BPE):
        alphabet = pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in str(split) else []
        trainer: trainers.Trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    elif isinstance(model, models.Unigram):
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options | {"vocab_size": 900})
    elif isinstance(model, models.WordPiece):
        trainer = trainers.WordPieceTrainer(**options)
    else:
        trainer = trainers.WordLevelTrainer(**options)
    # Sentence by sentence: without a pre-tokenizer a line is one word, and its pairs are learnt across spaces.
    made.train_from_iterator([line[i : i + 60] for line in TEXT.split("\n") for i in range(0, len(line), 60)], trainer)
    if post is not None:
        made.post_processor = post  # type: ignore[assignment]
    return made


def llama(prepend: bool, byte_fallback: bool = True) -> Tokenizer:
    """As Llama 2 and Mistral have it: no pre-tokenizer, spaces as a letter, a BOS, bytes for what is unknown."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")][0 if prepend else 1 :]
    learnt = trained(models.BPE(unk_token="<unk>", fuse_unk=True), normalizers.Sequence(steps))
    if not byte_fallback:
        return learnt
    import json

    data = json.loads(learnt.to_str())
    vocab = data["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    data["model"] |= {"byte_fallback": True}
    made = Tokenizer.from_str(json.dumps(data))
    made.decoder = decoders.ByteFallback()
    return made


def gemma() -> Tokenizer:
    """As Gemma has it: spaces as a letter, and a split on spaces, of which none are left."""
    return trained(
        models.BPE(unk_token="<unk>", fuse_unk=True),
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
    )


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
QWEN += r"|\s+(?!\S)|\s+"
FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*\b)|[^\d\s]+|\s+"


def byte_level(pattern: str, prefix: bool = False) -> object:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(prefix, use_regex=False)]
    )


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama, prepended": lambda: llama(True),
    "llama": lambda: llama(False),
    "llama, unknown fused": lambda: llama(True, byte_fallback=False),
    "gemma": gemma,
    "bare BPE, BOS and EOS": lambda: trained(models.BPE(unk_token="<unk>"), post=BOTH),
    "gpt-2 with a space before": lambda: trained(models.BPE(), None, pre_tokenizers.ByteLevel(True)),
    "gpt-2, bare bytes": lambda: trained(models.BPE(), None, pre_tokenizers.ByteLevel(False, use_regex=False)),
    "qwen, NFC": lambda: trained(models.BPE(), normalizers.NFC(), byte_level(QWEN), None),
    "digits from the right": lambda: trained(models.BPE(), None, byte_level(FROM_THE_RIGHT)),
    "t5": lambda: trained(
        models.Unigram(), normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="always"), BOTH
    ),
    "unigram, one word": lambda: trained(
        models.Unigram(), normalizers.Replace(" ", "▁"), pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
    "metaspace, first": lambda: trained(
        models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(prepend_scheme="first")
    ),
    "bert": lambda: trained(
        models.WordPiece(unk_token="<unk>"), normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), BOTH
    ),
    "wordpiece, one word": lambda: trained(models.WordPiece(unk_token="<unk>")),
    "words": lambda: trained(models.WordLevel(unk_token="<unk>"), None, pre_tokenizers.Whitespace()),
    "scripts": lambda: trained(
        models.BPE(unk_token="<unk>"), normalizers.Strip(), pre_tokenizers.UnicodeScripts(), BOTH
    ),
}


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made = KINDS[request.param]()
    made.add_special_tokens([AddedToken("<|im_start|>", lstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", pad_token="<pad>")


def text_of(kind: str, rng: random.Random) -> str:
    """A few thousand characters of one nature."""
    if kind == "mixed":
        return "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(250))
    if kind == "page":
        return "\n".join(document.text for document in documents(seed=rng.randrange(99), n=6))
    if kind == "one word":
        return "".join(rng.choice("abeint") for _ in range(2000))
    if kind == "letters":
        return "hello " + rng.choice("ax7é你") * 2001 + " hello"
    if kind == "pairs":
        return "hello " + rng.choice(["ab", "aab", "12", "0123456789", "\n\n "]) * 400 + " the end"
    if kind == "numbers":
        return "n " + "".join(rng.choice("0123456789") for _ in range(2000 + rng.randrange(9))) + " end"
    if kind == "spaces":
        return "a" + " " * 1500 + "b\n" + "\t \n" * 400 + " c"
    if kind == "marks":
        return "e" + "".join(rng.choice("\u0301\u0323\u0308") for _ in range(1500)) + " end"
    if kind == "unknown":
        return "a " + "".join(chr(0x10000 + rng.randrange(1500)) for _ in range(1500)) + " b"
    if kind == "specials":
        return "".join(rng.choice([" <|im_start|>", "<|im_start|> a ", "word ", "<s>", "x" * 30]) for _ in range(250))
    assert kind == "any"
    return "".join(chr(rng.choice([rng.randrange(1, 256), rng.randrange(0x2000, 0xD000)])) for _ in range(1500))


TEXTS = ("mixed", "page", "one word", "letters", "pairs", "numbers", "spaces", "marks", "unknown", "specials", "any")


@pytest.mark.parametrize("kind", TEXTS)
def test_the_tokens_are_those_of_the_whole(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With chunks so short that a page has many seams."""
    rng = random.Random(f"{kind} {tokenizer.backend_tokenizer.model}")
    place = importlib.import_module("qwen_scope.text.chunks")
    chunk, margin = rng.choice([(400, 60), (700, 40), (1000, 240)])
    monkeypatch.setattr(place, "CHUNK", chunk)
    monkeypatch.setattr(place, "MARGIN", margin)
    text = text_of(kind, rng)
    whole = tokenize(tokenizer, [text], max_length=None)
    ids, strings, _ = together(tokenizer, text)
    assert ids == whole.input_ids[0].tolist()
    assert strings == whole.strings[0]


@pytest.mark.slow
def test_a_long_page_of_a_tokenizer_without_words_is_read_in_parts() -> None:
    """At the real length, where it did not end before."""
    made = PreTrainedTokenizerFast(tokenizer_object=llama(True), unk_token="<unk>", bos_token="<s>")
    text = (TEXT * 40)[:150_000]
    ids, strings, parts = together(made, text)
    assert ids == made(text)["input_ids"]
    assert "".join(strings[1:]).endswith(text[-1000:])
    assert parts > 1
