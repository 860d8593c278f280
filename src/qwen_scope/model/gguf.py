"""GGUF files as language models: their blocks kept packed and unpacked where they are used, or unpacked once at load.

Transformers reads the config and the tokenizer out of a file and names its tensors; here the file is read quickly, and
the weights may stay packed on any device. A packed weight is unpacked by the arithmetic that unpacks it at load, so
both ways give the same activations where both compute in the same type.
"""

from __future__ import annotations

import math
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from qwen_scope.errors import FormatError, InputError, NotFoundError, foreign, need

from .packed import Packed, packed_kind, tie, unpacked

SUFFIX = ".gguf"
ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[^:]+\.gguf)", re.IGNORECASE)
VISION = "mmproj"  # what llama.cpp calls the vision tower of a model, in a file beside it
SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)

# Architectures whose tensors are each one parameter, with rows at most in another order; the weights of others are
# unpacked by transformers at load.
ROWS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")

# Types of values in a file's metadata, and how the fixed ones lie in it (docs/gguf.md of ggml).
FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)

# Types of tensors that hold a number per value.
PLAIN = (0, 1, 28, 30)  # float32, float16, float64, bfloat16


_READING = threading.Lock()


def gguf_file(source: str) -> str | None:
    """The GGUF file that a source names, or None: a file, a folder that holds one (a vision tower's aside) and no other
    model, or a file of a repository as `owner/name:FILE.gguf`.

    Raises:
        NotFoundError: no such file.   InputError: a folder with several.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [one for one in sorted(path.glob(f"*{SUFFIX}")) if not one.name.lower().startswith(VISION)]
        if not found or (path / "config.json").is_file():
            return None
        if len(found) > 1 and not all(SPLIT.search(one.name) for one in found):
            raise InputError(f"{source!r} holds {len(found)} GGUF files; name one, such as {str(found[0])!r}")
        return str(found[0])
    if path.is_file():
        return str(path) if path.suffix.lower() == SUFFIX else None
    if not source.lower().endswith(SUFFIX):
        return None
    if match := ON_HUB.fullmatch(source):
        return f"{match['repo']}:{match['file']}"
    raise NotFoundError(f"there is no file {source!r}; a file on the Hub is written owner/name:FILE{SUFFIX}")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        shape: of its values, as in PyTorch.   kind: the number of its type in ggml.
        start, size: where its bytes lie in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class Gguf:
    """A GGUF file on this machine.

    Attributes:
        path: the file.
        metadata: its keys, each with the number of its type (and, of lists, of their items) and its value.
        tensors: by the names that llama.cpp gives them.
    """

    path: Path
    metadata: Mapping[str, tuple[list[int], Any]]
    tensors: Mapping[str, Stored]

    @classmethod
    def open(cls, path: str | Path) -> Gguf:
        """Read the header of a file, or of a file on the Hub by `owner/name:FILE.gguf`.

        Raises:
            NotFoundError: the package gguf is missing, or the file can't be fetched.
            FormatError: it is no GGUF file, one of several parts, or shorter than its header says.
        """
        need("reading a GGUF file", "gguf", "accelerate")
        if match := ON_HUB.fullmatch(str(path)):
            from huggingface_hub import hf_hub_download

            with foreign(f"{match['file']!r} of {match['repo']!r} can't be fetched", NotFoundError):
                path = hf_hub_download(match["repo"], match["file"])
        path = Path(path)
        if parts := SPLIT.search(path.name):
            names = [f"{path.name[: parts.start()]}-{i:05d}-of-{parts[1]}{SUFFIX}" for i in range(1, int(parts[1]) + 1)]
            lost = [name for name in names if not path.with_name(name).exists()]
            absent = f", of which {len(lost)} are missing ({lost[0]})" if lost else ""
            raise FormatError(
                f"{path} is one of {int(parts[1])} parts{absent}; join all with llama-gguf-split --merge, and name the"
                " result"
            )
        if not path.stat().st_size:
            raise FormatError(f"{path} is cut short: it is empty")
        with foreign(f"{path} can't be read as GGUF"):
            try:
                found = cls(path, *_Header(path).read())
            except (struct.error, IndexError) as error:
                raise FormatError(f"{path} is cut short: it ends within its header") from error
        end = max((one.start + one.size for one in found.tensors.values()), default=0)
        if end > (size := path.stat().st_size):
            raise FormatError(f"{path} is cut short: its header speaks of {end:,} bytes, and it has {size:,}")
        return found

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights as they lie in the file."""
        return sum(one.size for one in self.tensors.values())

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the architecture."""
        return str(self.metadata["general.architecture"][1])

    @property
    def stays_packed(self) -> bool:
        """Whether the weights can stay packed in memory."""
        return self.architecture in ROWS and any(one.kind not in PLAIN for one in self.tensors.values())

    def config(self) -> PreTrainedConfig:
        """The model's config.

        Raises:
            FormatError: transformers knows no such architecture, or a value that the file has to state is missing.
        """
        with foreign(f"the config in {self.path} can't be read"), _read_quickly(self):
            return transformers.AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            NotFoundError: the file has none that transformers can build.
        """
        with foreign(f"{self.path} has no tokenizer that transformers can build", NotFoundError), _read_quickly(self):
            return transformers.AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)

    def model(self, auto: Any, config: PreTrainedConfig, dtype: torch.dtype, packed: bool) -> PreTrainedModel:
        """The model on the CPU, in eval mode.

        Args:
            auto: the auto class that builds it.   config: of this file.
            dtype: what it computes in, and what its weights are unpacked to.
            packed: keep what can stay packed as it lies in the file.

        Raises:
            FormatError: the weights do not fit the config.
        """
        if self.architecture not in ROWS:
            with foreign(f"the weights in {self.path} can't be loaded"):
                return auto.from_pretrained(
                    self.path.parent,
                    gguf_file=self.path.name,
                    quantization_config=transformers.GgufConfig(dequantize=True),
                    dtype=dtype,
                )
        blocks = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        if config.num_hidden_layers != len(blocks):
            raise FormatError(f"{self.path} holds {len(blocks)} blocks, its config says {config.num_hidden_layers}")
        model = empty(auto, config, dtype)
        self._fill(model, config, dtype, packed)
        if missing := [name for name, one in model.named_parameters() if one.is_meta]:
            raise FormatError(f"{self.path} lacks {len(missing)} weights, such as {missing[0]!r}")
        return model.eval().requires_grad_(False)

    def _fill(self, model: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype, packed: bool) -> None:
        """The file's tensors as parameters of the model, or as packed modules in their place."""
        of: type[TensorProcessor] = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        processor = of(config=config.to_dict())
        names = parameter_names(model, self.architecture)
        data = np.memmap(self.path, np.uint8, "r")
        for name, stored in self.tensors.items():
            if name not in names:
                continue
            place, _, attribute = names[name].rpartition(".")
            module = model.get_submodule(place)
            wanted = tuple(getattr(module, attribute).shape)
            if stored.shape != wanted:
                raise FormatError(f"{name!r} in {self.path} has the shape {stored.shape}, its config says {wanted}")
            holder = packed_kind(module)
            keep = packed and holder is not None and stored.kind not in PLAIN and attribute == "weight"
            rows = np.array(data[stored.start : stored.start + stored.size]).reshape(*stored.shape[:-1], -1)
            with foreign(f"{name!r} in {self.path} can't be read"):
                values = torch.from_numpy(rows) if keep else unpacked(torch.from_numpy(rows), stored.kind)
                # A change of the rows' order is the same for blocks as for values.
                values = torch.from_numpy(np.ascontiguousarray(processor.process(values.numpy(), name).weights))
            if keep and holder is not None:
                model.set_submodule(place, holder(module, Packed(values, stored.kind, dtype)))
            else:
                setattr(module, attribute, nn.Parameter(values.to(dtype), requires_grad=False))
        tie(model)


def parameter_names(model: PreTrainedModel, architecture: str) -> dict[str, str]:
    """The names of the model's parameters by those of llama.cpp, such as `blk.0.ffn_up.weight`."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (arch,) = (number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        module, _, attribute = name.rpartition(".")
        if (theirs := known.get_name(module)) is not None:
            found[f"{theirs}.{attribute}"] = name
    return found


def empty(auto: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters take no memory yet and whose buffers are real."""
    import accelerate

    with accelerate.init_empty_weights(include_buffers=False):
        return auto.from_config(config, dtype=dtype)


class _Header:
    """Reads what stands before the tensors of a file, in the order of ggml's specification of GGUF."""

    def __init__(self, path: Path) -> None:
        self.data, self.at = memoryview(np.memmap(path, np.uint8, "r").data), 0

    def read(self) -> tuple[dict[str, tuple[list[int], Any]], dict[str, Stored]]:
        """The metadata and the tensors.

        Raises:
            ValueError, struct.error: it is no GGUF file, or of another version.
        """
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        self.at = 4
        version, tensors, keys = self.numbers("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
        metadata = {self.string(): self.value(*self.numbers("I")) for _ in range(keys)}
        if metadata.get("general.architecture", ([], None))[0] != [STRING]:
            raise ValueError("it names no general.architecture")
        table = [(self.string(), self.shape(), *self.numbers("IQ")) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ([4], 32))[1]
        begin = -(-self.at // alignment) * alignment
        return metadata, {
            name: Stored(shape, kind, begin + offset, size_of(shape, kind)) for name, shape, kind, offset in table
        }

    def numbers(self, form: str) -> tuple[Any, ...]:
        """The next numbers, little-endian and without gaps."""
        found = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def string(self) -> str:
        """The next text: its length and its bytes."""
        (length,) = self.numbers("Q")
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8")

    def shape(self) -> tuple[int, ...]:
        """The next shape, in PyTorch's order."""
        (dimensions,) = self.numbers("I")
        return self.numbers(f"{dimensions}Q")[::-1]

    def value(self, kind: int) -> tuple[list[int], Any]:
        """The next value of a type, with that type."""
        if kind == ARRAY:
            of, count = self.numbers("IQ")
            if of in FIXED:
                return [ARRAY, of], list(self.numbers(f"{count}{FIXED[of]}"))
            return [ARRAY, of], [self.value(of)[1] for _ in range(count)]
        if kind == STRING:
            return [STRING], self.string()
        if kind not in FIXED:
            raise ValueError(f"a value has the unknown type {kind}")
        return [kind], self.numbers(FIXED[kind])[0]


def size_of(shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor in a file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return math.prod(shape) // elements * size


@contextmanager
def _read_quickly(file: Gguf) -> Iterator[None]:
    """Let transformers have a file's metadata from `file`.

    The reader of the package gguf (0.19) makes a NumPy view of every string, half a minute for a vocabulary of 152,000
    tokens, and transformers calls it for the config and for the tokenizer.
    """
    import gguf

    fields = {key: _field(types, value) for key, (types, value) in file.metadata.items()}
    given = SimpleNamespace(fields=fields, tensors=[SimpleNamespace(name=name) for name in file.tensors])
    with _READING:
        own, gguf.GGUFReader = gguf.GGUFReader, lambda path: given  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            gguf.GGUFReader = own


def _field(types: list[int], value: Any) -> SimpleNamespace:
    """A value as gguf's reader holds it: one part per item, and the types."""
    items = value if types[0] == ARRAY else [value]
    parts = [one.encode() if isinstance(one, str) else [one] for one in items]
    return SimpleNamespace(parts=parts, data=range(len(parts)), types=types)
