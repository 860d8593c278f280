"""What a token shows by itself, where no text is there to take it from: one that is promoted, a rival, a target."""

from __future__ import annotations

from typing import Any


def token_text(tokenizer: Any, token: int) -> str:
    """What a token shows: its text, and bytes that are no whole character as `<0xE3>`.

    That is how vocabularies with byte fallback name such a piece; byte-level ones (GPT-2's, Qwen's) have a letter for
    each byte, `ãģ`, which nobody reads. A space that a word begins with is kept where decoding one token drops it.
    """
    text, name = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    if name.startswith("▁") and not text.startswith(" "):  # SentencePiece's space, stripped at the start of a text
        return f" {text}"
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    raw = _bytes_of(name)
    # A name of letters that stand for bytes is one whose bytes decode to the same text.
    return name if raw is None or raw.decode(errors="replace") != text else _readable(raw)


def _bytes_of(name: str) -> bytes | None:
    """The bytes that a byte-level name spells, each letter one byte; None for a name with any other letter."""
    try:
        return bytes(_BYTE_OF[letter] for letter in name)
    except KeyError:
        return None


def _readable(raw: bytes) -> str:
    """Whole characters as they are, every other byte by its number."""
    shown: list[str] = []
    while raw:
        try:
            shown.append(raw.decode())
            break
        except UnicodeDecodeError as error:
            shown.append(raw[: error.start].decode())
            shown += [f"<0x{byte:02X}>" for byte in raw[error.start : error.end]]
            raw = raw[error.end :]
    return "".join(shown)


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's table: bytes that print in Latin-1 stand for themselves, the others for the letters from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _letters_of_bytes()
