"""Hostile weights files, each a function that writes one into a folder as `layer3.sae.pt` or `.safetensors`."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save as as_safetensors

D_SAE, D_MODEL = 24, 8
MARKER = "executed"  # what running code leaves behind, in the folder of the file


def good(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tensors of a harmless SAE."""
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_SAE, D_MODEL), "W_dec": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "b_dec": (D_MODEL,)}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def pt(folder: Path, content: object, protocol: int = 2) -> Path:
    path = folder / "layer3.sae.pt"
    torch.save(content, path, pickle_protocol=protocol)
    return path


def st(folder: Path, data: bytes) -> Path:
    path = folder / "layer3.sae.safetensors"
    path.write_bytes(data)
    return path


def raw(folder: Path, data: bytes) -> Path:
    path = folder / "layer3.sae.pt"
    path.write_bytes(data)
    return path


def pt_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Runs:
    """Unpickling this calls `function(argument)`."""

    def __init__(self, function: Callable, argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple:
        return self.call


def command(folder: Path) -> Runs:
    return Runs(os.system, f"touch {folder / MARKER}")


def with_pickle(folder: Path, data: bytes) -> Path:
    """A torch file whose data.pkl is replaced."""
    path = folder / "layer3.sae.pt"
    with zipfile.ZipFile(io.BytesIO(pt_bytes(good()))) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, data if name.endswith("data.pkl") else source.read(name))
    return path


def disguised(folder: Path) -> Path:
    """`os.system` fetched from the memo, with the name of something harmless standing where a reader looks."""
    call = f"touch {folder / MARKER}".encode()
    data = b"\x80\x04" + b"\x8c\x02os\x94\x8c\x06system\x940" + b"0"  # push and memoise both names, drop them
    data += b"\x8c\x0bcollections\x8c\x0bOrderedDict00"  # what a reader of the strings sees last
    data += b"h\x00h\x01\x93" + b"\x8c" + bytes([len(call)]) + call + b"\x85R."
    return with_pickle(folder, data)


def rewritten(
    folder: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED
) -> Path:
    """A good torch file with some of its records changed or left out."""
    path = folder / "layer3.sae.pt"
    with zipfile.ZipFile(io.BytesIO(pt_bytes(good()))) as source, zipfile.ZipFile(path, "w", compression) as target:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                target.writestr(name, data)
    return path


def header(claims: object, data: bytes = b"") -> bytes:
    """A safetensors file with the header given as it is."""
    text = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The good tensors with some replaced, added, or with None taken away."""
    both: dict[str, torch.Tensor | None] = {**good(), **tensors}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def with_hole(name: str, value: float) -> dict[str, torch.Tensor]:
    tensors = good()
    tensors[name][2] = value
    return tensors


def legacy(folder: Path) -> Path:
    path = folder / "layer3.sae.pt"
    torch.save(good(), path, _use_new_zipfile_serialization=False)
    return path


def bare_pickle(folder: Path) -> Path:
    return raw(folder, pickle.dumps(command(folder)))


GOOD_ST = as_safetensors(good())
ONE = {"W_enc": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}

# Each file, the error it must meet and a part of its sentence.
NOT_WHOLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty pt": (lambda f: raw(f, b""), "is empty"),
    "empty safetensors": (lambda f: st(f, b""), "is empty"),
    "half a pt": (lambda f: raw(f, pt_bytes(good())[:1500]), "is truncated"),
    "a pt without its last bytes": (lambda f: raw(f, pt_bytes(good())[:-30]), "is truncated"),
    "text": (lambda f: raw(f, b"<!doctype html><title>404</title>"), "no zip archive"),
    "a zip of something else": (lambda f: rewritten(f, lambda n, d: None if n.endswith(".pkl") else d), "no data.pkl"),
    "two pickles": (lambda f: two_pickles(f), "not a torch file"),
    "legacy pickle": (legacy, "no zip archive"),
    "a record too short": (
        lambda f: rewritten(f, lambda n, d: d[:8] if "/data/" in n else d),
        "not a whole torch file",
    ),
    "a record missing": (
        lambda f: rewritten(f, lambda n, d: None if n.endswith("/data/0") else d),
        "not a whole torch",
    ),
    "compressed": (lambda f: rewritten(f, lambda n, d: d, zipfile.ZIP_DEFLATED), "is compressed"),
    "a broken pickle": (lambda f: with_pickle(f, b"\x80\x02}q\x00X"), "not a whole torch file"),
    "no pickle at all": (lambda f: with_pickle(f, b"\xff\xff\xff"), "not a whole torch file"),
    "half a safetensors": (lambda f: st(f, GOOD_ST[:300]), "not a whole safetensors file"),
    "a safetensors without its last bytes": (lambda f: st(f, GOOD_ST[:-4]), "not a whole safetensors file"),
    "a safetensors with more behind": (lambda f: st(f, GOOD_ST + b"more"), "not a whole safetensors file"),
    "a header of 2**60 bytes": (lambda f: st(f, struct.pack("<Q", 2**60) + b"{}"), "not a whole safetensors file"),
    "a header that is no JSON": (lambda f: st(f, header(b"not json")), "not a whole safetensors file"),
    "offsets beyond the end": (lambda f: st(f, header(ONE)), "not a whole safetensors file"),
    "offsets that do not fit": (
        lambda f: st(f, header(ONE | {"b": ONE["W_enc"]}, bytes(8))),
        "not a whole safetensors",
    ),
}
RUNS_CODE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a command": (lambda f: pt(f, {"W_enc": command(f)}), "asks to import posix.system"),
    "a command, protocol 4": (lambda f: pt(f, {"W_enc": command(f)}, 4), "asks to import posix.system"),
    "eval": (
        lambda f: pt(f, {**good(), "x": Runs(eval, f"open({str(f / MARKER)!r}, 'w')")}),
        "asks to import __builtin__.eval",
    ),
    "a command instead of the dict": (lambda f: pt(f, command(f)), "asks to import posix.system"),
    "a bare pickle": (bare_pickle, "no zip archive"),
    "a command in disguise": (disguised, "not a whole torch file"),
    "a class of somebody's": (lambda f: pt(f, {"W_enc": Path("x")}), "asks to import pathlib"),
    "a sparse tensor": (
        lambda f: pt(f, changed(W_enc=torch.eye(D_SAE, D_MODEL).to_sparse())),
        "_rebuild_sparse_tensor",
    ),
}
WRONG_CONTENT: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "a list": (lambda f: pt(f, [torch.zeros(2)]), "FormatError", "holds a list, not a dict"),
    "a tensor": (lambda f: pt(f, torch.zeros(2)), "FormatError", "holds a Tensor, not a dict"),
    "a number inside": (lambda f: pt(f, {**good(), "k": 5}), "FormatError", "'k' of type int"),
    "a dict inside": (lambda f: pt(f, {"sae": good()}), "FormatError", "'sae' of type dict"),
    "missing": (lambda f: pt(f, changed(b_dec=None)), "FormatError", "lacks b_dec;"),
    "missing all": (lambda f: pt(f, {}), "FormatError", "lacks W_dec, W_enc, b_dec, b_enc;"),
    "extra": (lambda f: pt(f, changed(W_skip=torch.zeros(2))), "FormatError", "has the unknown W_skip;"),
    "other names": (
        lambda f: pt(f, {"encoder": torch.zeros(2)}),
        "FormatError",
        "lacks W_dec, .* the unknown encoder;",
    ),
    "threshold without architecture": (
        lambda f: pt(f, changed(threshold=torch.ones(D_SAE))),
        "FormatError",
        "threshold",
    ),
    "transposed": (
        lambda f: pt(f, changed(W_enc=good()["W_dec"], W_dec=good()["W_enc"])),
        "MismatchError",
        "both matrices look transposed",
    ),
    "one transposed": (lambda f: pt(f, changed(W_enc=good()["W_dec"])), "MismatchError", r"W_enc must be \(24, 8\)"),
    "another width": (lambda f: pt(f, changed(b_enc=torch.zeros(25))), "MismatchError", r"W_enc must be \(25, 8\)"),
    "biases as rows": (
        lambda f: pt(f, changed(b_enc=torch.zeros(1, D_SAE))),
        "MismatchError",
        "biases must be vectors",
    ),
    "a bias that is a number": (lambda f: pt(f, changed(b_dec=torch.tensor(0.0))), "MismatchError", "biases must be"),
    "float64": (lambda f: pt(f, good(torch.float64)), "FormatError", "stored as torch.float64; only float32"),
    "int8": (lambda f: pt(f, changed(W_enc=torch.ones(D_SAE, D_MODEL).to(torch.int8))), "FormatError", "torch.int8"),
    "two types": (lambda f: pt(f, changed(W_enc=good()["W_enc"].half())), "FormatError", "float16 and W_dec as"),
    "NaN in b_enc": (lambda f: pt(f, with_hole("b_enc", float("nan"))), "FormatError", "b_enc holds NaN .* position 2"),
    "inf in b_dec": (lambda f: pt(f, with_hole("b_dec", float("inf"))), "FormatError", "b_dec holds NaN .* position 2"),
    "a few bytes that claim to be much": (
        lambda f: pt(f, changed(W_enc=torch.zeros(1).expand(D_SAE, D_MODEL))),
        "FormatError",
        "not as many numbers",
    ),
    "nothing at all": (
        lambda f: pt(f, {n: torch.zeros([0] * t.ndim) for n, t in good().items()}),
        "InputError",
        "k must be between 1",
    ),
    "a threshold below zero": (
        lambda f: st(f, jumping(torch.arange(-2.0, D_SAE - 2))),
        "FormatError",
        "threshold holds -2 at position 0; thresholds are 0 or above",
    ),
    "one threshold below zero": (
        lambda f: st(f, jumping(torch.ones(D_SAE).index_fill(0, torch.tensor(7), -1e-30))),
        "FormatError",
        "threshold holds -1e-30 at position 7",
    ),
    "a threshold that is minus infinity": (
        lambda f: st(f, jumping(torch.full((D_SAE,), -float("inf")))),
        "FormatError",
        "threshold holds NaN or infinity, first at position 0",
    ),
    "one threshold for all": (lambda f: st(f, jumping(torch.ones(1))), "MismatchError", r"threshold must be \(24,\)"),
    "a threshold that is a number": (lambda f: st(f, jumping(torch.tensor(1.0))), "MismatchError", "threshold must be"),
    "a threshold in a column": (lambda f: st(f, jumping(torch.ones(D_SAE, 1))), "MismatchError", "threshold must be"),
    "whole thresholds": (lambda f: st(f, jumping(torch.ones(D_SAE).int())), "FormatError", "stored as torch.int32"),
    "a k that is words": (
        lambda f: st(f, noted(k="five")),
        "FormatError",
        "'k' beside the weights must be .* got 'five'",
    ),
    "a k of 5,000 digits": (lambda f: st(f, noted(k="9" * 5000)), "FormatError", "must be a whole number; got '9999"),
    "a k of nothing": (lambda f: st(f, noted(k="0")), "InputError", "k must be between 1"),
    "a layer of 5,000 digits": (lambda f: st(f, noted(layer="9" * 5000)), "FormatError", "'layer' beside the weights"),
    "NaN in a safetensors": (lambda f: st(f, as_safetensors(with_hole("b_enc", float("nan")))), "FormatError", "b_enc"),
    "float64 in a safetensors": (lambda f: st(f, as_safetensors(good(torch.float64))), "FormatError", "torch.float64"),
    "extra in a safetensors": (lambda f: st(f, as_safetensors(changed(x=torch.zeros(1)))), "FormatError", "unknown x"),
}


def jumping(threshold: torch.Tensor) -> bytes:
    return as_safetensors({**good(), "threshold": threshold}, {"architecture": "jumprelu"})


def noted(**metadata: str) -> bytes:
    return as_safetensors(good(), metadata)


CONFIGS: dict[str, tuple[bytes, str, str]] = {
    "no JSON": (b"{k: 5}", "FormatError", "config.json is not JSON"),
    "no text": (b"\xff\xfe\x00", "FormatError", "config.json is not JSON"),
    "too deep": (b"[" * 100_000, "FormatError", "config.json is not JSON"),
    "empty": (b"", "FormatError", "config.json is not JSON"),
    "a list": (b"[5]", "FormatError", "must hold a JSON object, not a list"),
    "k is text": (b'{"k": "5"}', "FormatError", "'k' in the config must be a positive whole number; got '5'"),
    "k is zero": (b'{"k": 0}', "FormatError", "got 0"),
    "k is negative": (b'{"k": -5}', "FormatError", "got -5"),
    "k is a half": (b'{"k": 5.5}', "FormatError", "got 5.5"),
    "k is infinite": (b'{"k": 1e999}', "FormatError", "got inf"),
    "k is true": (b'{"k": true}', "FormatError", "got True"),
    "k is larger than the dictionary": (b'{"k": 25}', "InputError", "k must be between 1 and .* 24; got 25"),
    "another width": (b'{"k": 5, "d_sae": 32768}', "MismatchError", "the config says d_sae 32768, but .* d_sae 24"),
    "another model": (b'{"k": 5, "d_model": 2048}', "MismatchError", "the config says d_model 2048"),
    "another architecture": (b'{"k": 5, "architecture": "gated"}', "FormatError", "'gated' can't be read"),
    "jumprelu without threshold": (b'{"architecture": "jumprelu"}', "FormatError", "lacks threshold"),
    "a hook point that is a number": (b'{"k": 5, "hook_point": 3}', "FormatError", "'hook_point' .* must be a string"),
    "a group that is a list": (b'{"k": 5, "group": []}', "FormatError", "'group' in the config must be a string"),
}


def two_pickles(folder: Path) -> Path:
    """A torch file with a second data.pkl, of which two readers might take different ones."""
    path = rewritten(folder, lambda name, data: data)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps(command(folder)))
    return path
