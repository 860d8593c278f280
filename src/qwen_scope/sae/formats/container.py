"""Weights files and configs, opened without copying and without running anything."""

from __future__ import annotations

import json
import pickletools
import re
import warnings
import zipfile
from _pickle import UnpicklingError  # what `weights_only=True` raises; nothing here unpickles by itself
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_scope.errors import FormatError, NotFoundError, brief, foreign
from qwen_scope.files import first_bytes, parse_value

STORED = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}

# All that a dict of tensors needs when it is unpickled.
HARMLESS = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch [A-Z][A-Za-z0-9]*Storage"
)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a `.pt` or `.safetensors` file, memory-mapped on the CPU, and its metadata.

    Raises:
        NotFoundError: no such file.   FormatError: it is not a whole, harmless file of its kind.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise FormatError(f"{path} is empty")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".pt":
        return read_pt(path), {}
    raise FormatError(f"{path} is neither a .pt nor a .safetensors file")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file as views of the mapped file, and its metadata."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is not a whole safetensors file: {one_line(error)}") from error


def read_pt(path: Path) -> dict[str, Tensor]:
    """The dict of tensors in a `.pt` file as views of the mapped file; nothing in it can run."""
    return checked_tensors(path, unpickled(path))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a `.pt` file that keeps them in a dict `state`, and the numbers beside it, written out.

    Raises:
        NotFoundError: no such file.   FormatError: it is not a whole, harmless file of that kind.
    """
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}")
    content = unpickled(path)
    state = content.get("state")
    if not isinstance(state, dict):
        raise FormatError(f"{path} holds no dict of tensors 'state', but {', '.join(map(repr, list(content)[:6]))}")
    said = {}
    beside = {name: value for name, value in content.items() if name != "state"}
    checked_tensors(path, {name: value for name, value in beside.items() if isinstance(value, Tensor)})
    for name, value in beside.items():
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(name, str) or isinstance(number, bool) or not isinstance(number, int | float):
            raise FormatError(
                f"{path} holds {brief(name)} of type {type(value).__name__}; beside 'state' stand numbers"
            )
        said[name] = str(number)
    return checked_tensors(path, state), said


def unpickled(path: Path) -> dict[Any, Any]:
    """The dict in a `.pt` file; nothing in it can run."""
    if path.stat().st_size == 0:
        raise FormatError(f"{path} is empty")
    check_zip(path)
    try:
        with warnings.catch_warnings():
            # An unusual pickle protocol is worth no warning: what it does not support is an error.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        UnpicklingError,
    ) as error:
        raise FormatError(f"{path} is not a whole torch file: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def checked_tensors(path: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The named tensors of a file, whose records must hold all of their bytes; raises FormatError."""
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise FormatError(f"{path} holds {name!r} of type {type(value).__name__}; only named tensors are read")
        if value.untyped_storage().nbytes() < value.nbytes:
            raise FormatError(f"{path} holds a {name} of shape {tuple(value.shape)}, but not as many numbers as that")
    check_records(path, content)
    return {name: value.detach() for name, value in content.items()}


def check_zip(path: Path) -> None:
    """Raise FormatError unless `path` is a whole zip whose pickle asks for nothing but tensors.

    `weights_only=True` refuses the same; looking first lets the message name what the file asked for.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            truncated = file.read(4) == b"PK\x03\x04"
        raise FormatError(f"{path} is truncated" if truncated else f"{path} is not a torch file: it is no zip archive")
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise FormatError(f"{path} is not a torch file: it has no data.pkl")
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                    raise FormatError(f"{path} is compressed, which torch.save never does, so it can't be mapped")
            asked = {name for name in globals_of(archive.read(pickles[0])) if not HARMLESS.fullmatch(name)}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise FormatError(f"{path} is not a whole torch file: {one_line(error)}") from error
    if asked:
        wanted = ", ".join(sorted(name.replace(" ", ".") for name in asked))
        raise FormatError(f"{path} asks to import {wanted} when opened, which tensors never need; it was not opened")


def check_records(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise FormatError unless every tensor's bytes fill a record of the archive.

    A mapped file is cut by the sizes its pickle claims, so a shorter record would be read on into what lies behind it.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    with zipfile.ZipFile(path) as archive:
        records = Counter(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    if Counter(storages.values()) - records - Counter({0: len(storages)}):
        raise FormatError(f"{path} is not a whole torch file: it claims more bytes than its records hold")


def globals_of(data: bytes) -> set[str]:
    """The `module name` pairs a pickle would import; `STACK_GLOBAL` takes its two from the strings before it."""
    found: set[str] = set()
    strings: list[str] = []
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("GLOBAL", "INST"):
            found.add(str(argument))
        elif code.name == "STACK_GLOBAL":
            found.add(" ".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return found


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file: eight bytes with the length of a JSON header, the header, the numbers, wide types first.

    The package's own writer puts a further file beside the one it is given, which a kill leaves behind in full size,
    and the keys of its header in any order. This one gives the same bytes every time.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        kind = STORED[tensors[name].dtype]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def write_weights(path: Path, container: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Store the tensors in a file of that kind; raises OSError or RuntimeError where the disk refuses."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # A view would drag the whole storage behind it into the file.
    whole = {n: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for n, t in whole.items()}
    if container == "safetensors":
        write_safetensors(path, whole, metadata)
    else:
        with path.open("wb") as file:  # by its name, that name would become a part of the file
            torch.save(whole, file)


def read_config(path: Path | None) -> dict[str, Any]:
    """The JSON object in `path`, `{}` for None; raises FormatError for anything else."""
    if path is None:
        return {}
    if not path.exists():
        raise NotFoundError(f"there is no file {path}")
    with foreign(f"{path} can't be read"):
        data = first_bytes(path)
    config = parse_value(data, str(path))
    if not isinstance(config, dict):
        raise FormatError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def one_line(error: BaseException) -> str:
    """The first sentence of an error's message, without the advice that torch puts around it."""
    said = str(error)
    said = said.rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return re.split(r"[.;]? *\n|\. ", said)[0].rstrip(".")[:160]
