"""Spellings of the command line that a version ago were the usual ones: they still work, with a note."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from qwen_scope.errors import QwenScopeWarning

READING = {"--field": ("--column",), "--chat": ("--chat", "default")}
ROWS = {"--row": ("--context-length",), "--rows": ("--batch-size",)}

# By command: an option as it was spelt, and as it is spelt now. An option that took no value now takes the one given.
OLD: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {**READING, **ROWS, "--spread": ("--parallel",)},
    "eval": {**READING, **ROWS},
    "synthesize": {"-n": ("--sample",)},
    "posttrain prepare": {"-n": ("--sample",)},
    "posttrain sft": {"-n": ("--sample",)},
    "posttrain repetition": {"--prompt-column": ("--column",)},
    "posttrain rl": {"--prompt-column": ("--column",)},
}

# By command: options whose work a measured threshold has taken over, and whether they took a value.
GONE = {command: {"--skip-special": False, "--sink-multiple": True} for command in ("train", "eval", "extract")}


# Commands in which a feature was named by --layer and --feature, and is now by --feature LAYER/FEATURE.
SPLIT = ("steer", "sweep", "validate")


# Commands in which features were named by a layer and a list, and are now by --features LAYER/FEATURE,...
LISTED = ("label", "export", "synthesize")


def respelled(argv: Sequence[str]) -> list[str]:
    """The arguments with old spellings replaced; each is said in a warning."""
    words = list(argv)
    if words and words[0] in SPLIT:
        words = [words[0], *one_name(words[1:])]
    if words and words[0] in LISTED:
        words = [words[0], *names_of_list(words[1:])]
    known = {*OLD, *GONE}
    first = next((n for n in (1, 2) if " ".join(words[:n]) in known), 0)
    command, out, words = " ".join(words[:first]), words[:first], words[first:]
    old, gone = OLD.get(command, {}), GONE.get(command, {})
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name in gone:
            if gone[name] and not equals:
                value = words.pop(0) if words else ""
            out += _without(name, value)
            continue
        if word[:2] in old and not equals and word[2:]:  # a short option with its value
            name, equals, value = word[:2], "=", word[2:]
        new = old.get(name)
        if new is None or (new[0] == name and (equals or not _lacks_value(words))):
            out.append(word)
            continue
        _say(f"{name} is now {' '.join(new)}")
        out += [new[0] + equals + value, *new[1:]]
    return out


def one_name(words: Sequence[str]) -> list[str]:
    """The words of a command with a feature's layer and index in one option, LAYER/FEATURE."""
    out: list[str] = []
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("--layer", "--feature") and (equals or rest):
            found[name] = value if equals else rest.pop(0)
            continue
        if name == "--target-feature" and (equals or rest):
            value = value if equals else rest.pop(0)
            if ":" in value:
                value = value.replace(":", "/", 1)
                _say(f"a feature is now named LAYER/FEATURE: --target-feature {value}")
            out += [name, value]
            continue
        out.append(word)
    if len(found) == 2 and "/" not in found["--feature"]:
        name = f"{found['--layer']}/{found['--feature']}"
        _say(f"--layer {found['--layer']} --feature {found['--feature']} is now --feature {name}")
        return [*out, "--feature", name]
    return [*out, *(part for pair in found.items() for part in pair)]


def names_of_list(words: Sequence[str]) -> list[str]:
    """The words of a command with the layer of listed features in each of their names."""
    out: list[str] = []
    found: dict[str, tuple[str, str]] = {}
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        kind = {"--layers": "--layer", "--feature": "--features", "-f": "--features"}.get(name, name)
        if kind in ("--layer", "--features") and (equals or rest):
            found[kind] = (name, value if equals else rest.pop(0))
            continue
        out.append(name + equals + value)
    (at, layer), (_, names) = found.get("--layer", ("", "")), found.get("--features", ("", ""))
    if layer.isdecimal() and names and "/" not in names:
        named = ",".join(f"{layer}/{part.strip()}" for part in names.split(","))
        _say(f"{at} {layer} --features {names} is now --features {named}")
        return [*out, "--features", named]
    return [*out, *(part for pair in found.values() for part in pair)]


def _without(name: str, value: str) -> list[str]:
    """What an option that is gone stands for now: nothing, or where it left no sinks out, that every token counts."""
    if name == "--sink-multiple" and _is_zero(value):
        _say("--sink-multiple 0 is now --count all, which leaves special tokens in, too")
        return ["--count", "all"]
    _say(f"{name} is not needed: first and special tokens and sinks, by a measured threshold, are left out by default")
    return []


def _is_zero(value: str) -> bool:
    try:
        return float(value) == 0
    except ValueError:
        return False


def _say(what: str) -> None:
    warnings.warn(f"{what}; the old spelling goes with the next version", QwenScopeWarning, 3)


def _lacks_value(rest: Sequence[str]) -> bool:
    """Whether what follows an option is not its value: nothing, or another option."""
    return not rest or rest[0].startswith("-")
