"""The options that commands share, named once."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from qwen_scope.errors import InputError, brief, foreign

from . import names, output, whose

OneOf = TypeVar("OneOf", bound=str)

# The range of a seed that every generator of random numbers below us takes.
SEED: Any = {"min": 0, "max": 2**32 - 1}

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

if TYPE_CHECKING:
    import torch

    from qwen_scope.scope import Scope, ScopeOptions
    from qwen_scope.text import Chat as ChatMode
    from qwen_scope.text import Corpus, CorpusOptions, Counted

RECIPES = (".json", ".yaml", ".yml")

Model = Annotated[str, typer.Option("--model", help="Language model: 'lab' (bundled), a Hub id, a folder or a GGUF.")]
StoreModel = Annotated[
    str | None, typer.Option("--model", help="Language model. Default: the one the store was made with, or the lab.")
]
Sae = Annotated[
    str | None,
    typer.Option("--sae", help="SAEs: a group's name or Hub id, or a folder. Default: the model's, if it has one."),
]
ShownLayers = Annotated[
    str | None,
    typer.Option(
        "--layers", "--layer", help="Layers, such as 3 or 0,2-5. Default: the middle; all with --response or --json."
    ),
]
LastLayers = Annotated[
    str | None, typer.Option("--layers", "--layer", help="Layers, such as 3 or 0,2-5. Default: the last two.")
]
TableLayers = Annotated[
    str | None, typer.Option("--layers", "--layer", help="Layers, such as 3 or 0,2-5. Default: the table's.")
]
StartLayers = Annotated[
    str | None,
    typer.Option("--layers", "--layer", help="Layers, such as 3 or 0,2-5. Default: those of --start-from, or all."),
]
Layers = Annotated[str | None, typer.Option("--layers", "--layer", help="Layers, such as 3 or 0,2-5. Default: all.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 or mps. Default: CUDA, else MPS, else the CPU.")
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Type of the model's weights: float32, bfloat16, float16, or auto: as stored.")
]
K = Annotated[int | None, typer.Option("--k", help="Features active per token, only where the files don't say it.")]
Chat = Annotated[
    str | None, typer.Option("--chat", help="Wrap the text in the chat template: default, thinking or non_thinking.")
]
Count = Annotated[
    str | None,
    typer.Option(
        "--count",
        help="all: every token counts. Default: all but the first of each row, special tokens and sinks.",
    ),
]
DOCUMENTS: Any = typer.Argument(
    metavar="CORPUS",
    help="A .txt, .jsonl, .csv, .tsv or .parquet file (also .gz), a folder of such, a dataset of the Hub"
    " (owner/name), or 'lab', of which lab:language=de is a part.",
)
Documents = Annotated[str, DOCUMENTS]
Phase = Annotated[
    str | None,
    typer.Option(
        "--phase",
        help="Only these phases of a conversation: system, user, thinking, answer, tool_call, tool_result; or all.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]


def parse_count(text: str | None) -> Counted | None:
    """Which tokens count: all for `all`, None where that is left to what is measured.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    from qwen_scope.text import Counted

    one_of("--count", text, ("all",))
    return Counted.everything()


def parse_template(text: str | None) -> str | None:
    """A template as it is typed, where `\\n` and `\\t` stand for an end of line and a tab."""
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")


def layers_tuple(text: str | None) -> tuple[int, ...] | None:
    """Layers as `parse_layers` reads them, as a tuple."""
    wanted = parse_layers(text)
    return None if wanted is None else tuple(wanted)


def names_tuple(text: str | None) -> tuple[str, ...]:
    """`a,b` as names."""
    return tuple(text.split(",")) if text else ()


def numbers_tuple(text: str) -> tuple[float, ...]:
    """`0.25,0.5,1` as numbers.

    Raises:
        InputError: anything else.
    """
    with foreign(f"{brief(text)} is no list of numbers, such as 0.25,0.5,1", InputError):
        return tuple(float(part) for part in text.split(","))


def parse_layers(text: str | None) -> list[int] | None:
    """`0,2-5` as a list of layers, `layer3` and `layers.3.resid_post` too; None and `all` mean all.

    Raises:
        InputError: anything else.
    """
    from qwen_scope.scope import parse_layers

    return None if text is None else parse_layers(text)


def parse_numbers(option: str, text: str) -> list[int]:
    """`0,5-8` as a list of whole numbers.

    Raises:
        InputError: anything else.
    """
    from qwen_scope.sae import numbers_in

    found = [numbers_in(part) for part in text.split(",")]
    if any(one is None for one in found):
        raise InputError(f"{option} takes numbers and ranges such as 0,5-8, not {brief(text)}")
    return sorted({number for one in found for number in one or ()})


def place_of(layer: int | None, feature: str | None) -> tuple[int | None, int | None]:
    """Layer and feature from `LAYER/FEATURE`, or from a feature's number beside `--layer`; None for what is left out.

    Raises:
        InputError: neither of the two, or two layers that differ.
    """
    from qwen_scope.sae import parse_feature

    if feature is None or (feature.isascii() and feature.isdigit() and len(feature) <= 9):
        return layer, None if feature is None else int(feature)
    named, number = parse_feature(feature)
    if layer is not None and layer != named:
        raise InputError(f"--feature {feature} is of layer {named}; leave --layer {layer} out")
    return named, number


def open_scope(asked: ScopeOptions) -> Scope:
    """The scope a command was asked for; where nobody asked and it is the lab's, it says so."""
    quiet()
    whose.refuse_other_saes(asked.sae)
    scope = asked.open()
    whose.say_whose()
    whose.say_terms(scope.saes.source)
    names.know(scope)
    return scope


def open_asked(asked: ScopeOptions) -> Scope:
    """`open_scope` for a group of options, with a spinner."""
    with output.status("opening the model"):
        return open_scope(asked)


def folders_of(asked: ScopeOptions) -> list[str | Path]:
    """The folders that a scope is read from, which no output may replace."""
    return folders(asked.model, asked.sae, asked.adapter)


def typed_or_piped(text: str) -> str:
    """The text itself, or for `-` standard input without the newline that a shell's last line ends with.

    Raises:
        InputError: standard input is not text.
    """
    if text != "-":
        return typed(text)
    with foreign("standard input can't be read", InputError):
        return sys.stdin.read().removesuffix("\n").removesuffix("\r")


def typed(text: str) -> str:
    """A text from the command line; if it is the name of a file here, standard error says how to read that instead."""
    # os.path takes any text; Path refuses one that is longer than a name may be
    if text.strip("./\\") and os.path.exists(text):
        folder = os.path.isdir(text)
        how = "read its texts with qwen-scope extract" if folder else f'to read it, write "$(cat {shlex.quote(text)})"'
        kind = "folder" if folder else "file"
        output.say(f"qwen-scope: {text} is a {kind} here; its name was read as the text; {how}")
    return text


def read(source: Any, reading: CorpusOptions, lab: int | None = 1000, share: tuple[int, int] = (1, 1)) -> Corpus:
    """The documents of a source, or a share; of the lab, which has no end, `lab` where no sample is asked for."""
    from qwen_scope.text import Corpus, is_lab

    if is_lab(source) and reading.sample is None:
        reading = replace(reading, sample=lab)
    return Corpus.of(source, reading, rank=share[0] - 1, world=share[1])


def parse_share(text: str | None) -> tuple[int, int]:
    """Which share of how many, counted from 1; the only one where nothing is said.

    Raises:
        InputError: it is not written so, or there is no such share.
    """
    if text is None:
        return 1, 1
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*", text)
    number, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= of:
        many = of or 16
        shares = f"from 1/{many} to {many}/{many}"
        raise InputError(f"{brief(text)} is no share; write its number and how many there are, {shares}")
    return number, of


def check_chat(chat: str | None) -> ChatMode | None:
    """The mode of the chat template, or None; raises InputError for anything else."""
    from qwen_scope.text import CHATS

    return None if chat is None else one_of("--chat", chat, CHATS)


def check_phases(phase: str | None) -> list[str] | None:
    """`thinking,answer` as a list, all of them for `all`, or None; raises InputError for a phase that there is not."""
    from qwen_scope.text import PHASES, phase_numbers

    if phase is None:
        return None
    if phase == "all":
        return list(PHASES)
    phases = [part.strip() for part in phase.split(",")]
    phase_numbers(phases)
    return phases


def phases_tuple(phase: str | None) -> tuple[str, ...] | None:
    """As `check_phases`, for an option of a frozen dataclass."""
    phases = check_phases(phase)
    return None if phases is None else tuple(phases)


def weight_type(name: str | None) -> torch.dtype | None:
    """The type of an SAE's weights; None keeps the stored one.

    Raises:
        InputError: not a type that weights are stored in.
    """
    import torch

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
    if name is not None and name not in types:
        raise InputError(f"--dtype is one of {', '.join(types)}, not {name!r}")
    return types[name] if name else None


def parse_size(text: str) -> int:
    """`24GB`, `16 GiB`, `500MB` or plain bytes; raises InputError for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmgt]i?)?b?\s*", text.lower())
    if not match:
        raise InputError(f"{brief(text)} is not a size; write it as 24GB or 16GiB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def one_of(option: str, value: str, known: Sequence[OneOf]) -> OneOf:
    """The value, if it is one of those known; raises InputError for another."""
    for name in known:
        if value == name:
            return name
    raise InputError(f"{option} is one of {', '.join(known)}, not {value!r}")


def sae_source(model: str, sae: str | None) -> str:
    """The SAEs that were named, or those of the model."""
    from qwen_scope.scope import resolve

    return resolve(model, sae)[1]


def folders(*sources: str | Path | None) -> list[str | Path]:
    """Of models, SAEs and corpora those that lie on this machine, by their path; a bare name is one of the catalog."""
    return [one for one in sources if one is not None and (isinstance(one, Path) or "/" in one or os.sep in one)]


def files(*sources: str | None) -> list[str]:
    """Of sources of documents those that may lie on this machine: all but the lab."""
    from qwen_scope.text import is_lab

    return [one for one in sources if one is not None and not is_lab(one)]


def quiet() -> None:
    """Silence transformers' bars and advice: what goes wrong comes as an error of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
