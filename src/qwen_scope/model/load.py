"""A language model and its tokenizer from a folder or the Hub, with one clear sentence where that fails."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.errors import FormatError, InputError, NotFoundError, brief, foreign, need

from . import adapter as adapters
from .gguf import Gguf, gguf_file
from .place import folder_of, known_type, read_config, sentence
from .quantized import quantised
from .unwrap import tokenizer_of, unwrapped
from .weights import load_weights

DTYPES = ("float32", "bfloat16", "float16", "auto")
QUANTIZATIONS = ("8bit", "4bit")


@dataclass(frozen=True)
class LoadedModel:
    """A language model in eval mode without gradients, and its tokenizer.

    Attributes:
        model: any transformers model with a decoder.
        tokenizer: as the model's folder has it; nothing is added to it.
        name: the source it was loaded from, a hub id or a folder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization: str | Any | None = None,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load a language model and its tokenizer.

    Args:
        source: a folder that `save_pretrained` wrote, a hub id such as `Qwen/Qwen3-1.7B-Base`, or a GGUF: a file, a
            folder that holds one, or `owner/name:FILE.gguf` on the Hub. A folder with a PEFT adapter stands for the
            model that it names as its base, with the adapter merged into the weights.
        device: where it runs; None takes CUDA, else MPS, else the CPU.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the one its weights are in. The weights of a GGUF stay
            packed with `auto`, computing in float32 on the CPU and in bfloat16 elsewhere; any other type unpacks them.
        device_map: `auto` or a map to spread the model over devices, in place of `device`; needs accelerate.
        quantization: `8bit` or `4bit` (needs bitsandbytes), or a quantisation config of transformers.
        revision: a branch, tag or commit on the Hub.
        adapter: a folder with a PEFT adapter to be merged into the model.

    A vision-language checkpoint whose text part transformers can load alone (Qwen3.5) comes as that text model.

    Raises:
        NotFoundError: no such folder, repository, revision or weights, or no network and nothing in the cache.
        FormatError: a folder whose config or weights are not what they should be.
        InputError: an unknown dtype, device or architecture, or options that exclude each other.
    """
    name = os.fspath(source)
    if dtype not in DTYPES:
        raise InputError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    if adapter is not None or adapters.is_adapter(name):
        placed = {"device": device, "device_map": device_map, "quantization": quantization, "revision": revision}
        return _load_adapted(name, None if adapter is None else os.fspath(adapter), dtype, placed)
    if (file := gguf_file(name)) is not None:
        if device_map is not None or quantization is not None:
            raise InputError("a GGUF is quantised already and runs on one device: drop device_map and quantization")
        return _load_gguf(name, file, device, dtype)
    config = load_config(name, revision=revision)
    as_is = quantization is not None and not isinstance(quantization, str)
    stored = None if as_is else quantised(name, config)
    if stored is not None and quantization is not None:
        raise InputError(f"the weights of {name!r} are quantised already ({stored}); drop quantization")
    if stored is not None:
        stored.check_packages(name)
    own = _placement(device, device_map, quantization, stored is not None and not stored.unpacked)
    auto = auto_class(config.model_type, name)
    place = folder_of(name) or name
    tokenizer = _tokenizer(name, place, revision)
    model: Any = load_weights(name, place, auto, config, stored, {"revision": revision, "dtype": dtype, **own})
    if "device_map" not in own:
        chosen = _device(device)
        with foreign(f"{name!r} does not fit onto {str(chosen)!r}", InputError):
            model = model.to(chosen)
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, name)


def live_model(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModel:
    """A model that is in memory already, such as one of transformers or PEFT, as `load_model` would give it.

    Nothing of it is changed; its name is the one that its config remembers. Of a bridge of TransformerLens or a model
    of nnsight it is the model inside, and their tokenizer where none is given.

    Raises:
        InputError: it is no transformers model, it comes without a tokenizer, or it is in training mode.
    """
    tokenizer = tokenizer or tokenizer_of(model)
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not isinstance(config, PreTrainedConfig):
        raise InputError(f"a model is a name, a folder or a model of transformers or PEFT, not {brief(model)}")
    if tokenizer is None:
        raise InputError("a model in memory needs its tokenizer beside it: pass tokenizer=")
    if model.training:
        raise InputError("the model is in training mode, where dropout moves its features; call model.eval() first")
    within: Any = model
    if hasattr(model, "get_base_model"):  # of PEFT: the layers of an adapter that changes weights lie in the model
        if not hasattr(model.base_model, "merge_adapter"):
            raise InputError("this PEFT model puts learnt tokens before a text, which is not supported here")
        within = within.get_base_model()
    return LoadedModel(within, tokenizer, config._name_or_path or type(within).__name__)


def load_config(source: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedConfig:
    """The config of a model, without its weights, from the same sources as `load_model`.

    Raises:
        NotFoundError: no such folder, repository or revision, or no network and nothing in the cache.
        FormatError: its config is not what it should be.
        InputError: an unknown architecture.
    """
    name = os.fspath(source)
    if (file := gguf_file(name)) is not None:
        return Gguf.open(file).config()
    if adapters.is_adapter(name):
        return load_config(adapters.base_of(Path(name).expanduser()), revision=revision)
    place = folder_of(name) or name
    known_type(name, read_config(name, place, revision))
    with foreign(f"the config.json of {name!r} holds a value that does not fit"):
        try:
            return transformers.AutoConfig.from_pretrained(place, revision=revision)
        except hub.StrictDataclassError as error:  # its first line names the class alone
            raise FormatError(
                f"the config.json of {name!r} holds a value that does not fit: {sentence(error)}"
            ) from error


def auto_class(model_type: str, name: str | None = None) -> Any:
    """The auto class of transformers that builds the decoder of a model type, text alone where it can.

    Raises:
        InputError: the model type is not a decoder language model; `name` is what the sentence calls it.
    """
    if model_type in transformers.CONFIG_MAPPING:
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
            if transformers.CONFIG_MAPPING[model_type] in auto._model_mapping:
                return auto
    raise InputError(
        f"{name or 'the model'!r} has the architecture {model_type!r}, which is not a decoder language model"
    )


def default_device() -> torch.device:
    """CUDA if available, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return default_device()
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"{device!r} is not a device; write 'cpu', 'cuda', 'cuda:1' or 'mps'") from None
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(chosen.type, lambda: True)
    missing, has = f"device {str(chosen)!r} is not available here", f"this machine has {default_device().type!r}"
    if not there():
        raise InputError(f"{missing}; {has}")
    # Its number, and a kind that only some builds have or that holds no numbers, show when it is used.
    with foreign(missing, InputError, has):
        torch.zeros(1, device=chosen).item()
    return chosen


def _placement(device: Any, device_map: Any, quantization: Any, stays_quantised: bool) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where and how small the weights go."""
    accelerate = find_spec("accelerate") is not None
    if device_map is not None:
        if device is not None:
            raise InputError("device and device_map exclude each other; pass one of them")
        need("spreading a model over devices", "accelerate")
        place: dict[str, Any] = {"device_map": device_map}
    else:
        chosen = _device(device)
        # straight onto the device, without a copy in host memory
        place = {"device_map": {"": chosen}} if accelerate and chosen.type != "cpu" else {}
    if stays_quantised:  # transformers would move to a GPU what has no map
        return {"device_map": {"": _device(device)}, **place}
    if quantization is None:
        return place
    if isinstance(quantization, str):
        if quantization not in QUANTIZATIONS:
            raise InputError(f"quantization is one of {', '.join(QUANTIZATIONS)}, not {quantization!r}")
        need(f"quantization {quantization!r}", "bitsandbytes", "accelerate")
        quantization = transformers.BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit", load_in_4bit=quantization == "4bit"
        )
    return {"device_map": {"": _device(device)}, **place, "quantization_config": quantization}


def _load_adapted(source: str, adapter: str | None, dtype: str, placed: dict[str, Any]) -> LoadedModel:
    folder = Path(source if adapter is None else adapter).expanduser()
    if not (folder / adapters.CONFIG).is_file():
        raise NotFoundError(f"there is no adapter in {str(folder)!r}: it has no {adapters.CONFIG}")
    base = adapters.base_of(folder) if adapter is None else source
    if adapter is not None:
        adapters.compare_base(folder, base)
    if dtype == "auto" and gguf_file(base) is not None:  # packed weights take no change
        dtype = "float32"
    found = load_model(base, dtype=dtype, **placed)
    own = adapters.has_tokenizer(folder)
    tokenizer = _tokenizer(str(folder), str(folder), None) if own else found.tokenizer
    return LoadedModel(adapters.merge(found.model, base, folder), tokenizer, str(folder))


def _load_gguf(name: str, file: str, device: str | torch.device | None, dtype: str) -> LoadedModel:
    gguf, chosen = Gguf.open(file), _device(device)
    config = gguf.config()
    computes = ("float32" if chosen.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
    model: Any = gguf.model(auto_class(config.model_type, name), config, getattr(torch, computes), dtype == "auto")
    with foreign(f"{name!r} does not fit onto {str(chosen)!r}", InputError):
        return LoadedModel(model.to(chosen), gguf.tokenizer(), name)


def load_tokenizer(source: str | os.PathLike[str], *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights, from the same sources as `load_model`.

    Raises:
        NotFoundError: there is none.
    """
    name = os.fspath(source)
    if (file := gguf_file(name)) is not None:
        return Gguf.open(file).tokenizer()
    if adapters.is_adapter(name) and not adapters.has_tokenizer(folder := Path(name).expanduser()):
        return load_tokenizer(adapters.base_of(folder), revision=revision)
    return _tokenizer(name, folder_of(name) or name, revision)


def _tokenizer(name: str, place: str, revision: str | None) -> PreTrainedTokenizerBase:
    hint = f"a newer transformers than {transformers.__version__} may read it"
    with foreign(f"{name!r} has no tokenizer that transformers can load", NotFoundError, hint):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision)
        known = tokenizer.encode("a", add_special_tokens=False)
    if not known:  # transformers makes an empty one where there is no file
        raise NotFoundError(f"{name!r} has no tokenizer; put its tokenizer.json beside the weights")
    return tokenizer
