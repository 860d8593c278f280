"""Numbers, lists of numbers and devices that are typed: what can't be one is refused before any work begins."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from typed import COMMANDS, LEAVES

from qwen_scope.cli import main
from qwen_scope.cli.options import SEED, parse_layers, parse_size
from qwen_scope.errors import FormatError, InputError
from qwen_scope.model import HookPoint, load_model
from qwen_scope.sae import parse_features
from qwen_scope.sae.formats.hooks import layer_in
from qwen_scope.steer import Decoding, Where, generate


def bound(option: Any, name: str) -> Any:
    """A bound of an option, which Typer keeps at the option or, in older versions, at its type."""
    return getattr(option, name) if hasattr(option, name) else getattr(option.type, name)


def test_every_seed_is_one_that_all_generators_take() -> None:
    seeds = {
        (path, name): (bound(option, "min"), bound(option, "max"))
        for path in LEAVES
        for option in COMMANDS[path].params
        for name in option.opts
        if name == "--seed" or (path, name) == ("posttrain prepare", "--random")
    }
    assert len(seeds) > 20
    assert set(seeds.values()) == {(0, 2**32 - 1)}
    # The narrowest of those below us.
    import numpy as np

    np.random.RandomState(SEED["max"])
    with pytest.raises(ValueError, match="Seed must be"):
        np.random.RandomState(SEED["max"] + 1)


@pytest.mark.parametrize("seed", ["-1", "4294967296", "9" * 40, "1.5", "NaN", "²"])
@pytest.mark.parametrize("words", [["store", "x", "-f", "1"], ["lab", "texts"], ["analyze", "drift", "a", "b"]])
def test_a_seed_that_is_none_is_refused(words: list[str], seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--seed", seed]) == 2
    assert "Invalid value for '--seed'" in capsys.readouterr().err


LISTS = ["0-99999999999", "0-999999999", "1-" + "9" * 5000, "9" * 5000, "5-4", "", ",", "1,,2", "-1", "2-", "1.5", "x"]


@pytest.mark.parametrize("text", LISTS, ids=lambda text: text[:12])
@pytest.mark.parametrize("parse", [parse_layers, parse_features])
def test_lists_that_are_none_or_too_long(parse: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert len(str(caught.value)) < 250


def test_lists_are_read() -> None:
    assert parse_features("3, 17,40-43,3") == [(None, one) for one in [3, 17, 40, 41, 42, 43]]
    assert parse_features("5/17, 2/40-41,5 / 3,5/17") == [(2, 40), (2, 41), (5, 3), (5, 17)]
    assert parse_layers("0,2-4,layer3,layers.9.resid_post") == [0, 2, 3, 4, 9]
    assert len(parse_features("0-131071")) == 2**17
    for text in ("layers.3", "all", "٣"):  # a layer's names are no feature's
        with pytest.raises(InputError, match="features are named LAYER/FEATURE"):
            parse_features(text)


@pytest.mark.parametrize("form", ["{}", "layer{}", "layers.{}.resid_post", "blocks.{}.hook_resid_post"])
def test_numbers_of_thousands_of_digits_name_no_layer(form: str) -> None:
    name = form.format("9" * 5000)
    assert layer_in(name) is None
    with pytest.raises(InputError) as caught:
        HookPoint.parse(name)
    assert len(str(caught.value)) < 250
    with pytest.raises(InputError):
        Where.parse(name)


@pytest.mark.parametrize("size", ["9" * 5000, "9" * 400 + "GB", "GB", "-1GB", "1e9", "٣GB", "1.GB", ""])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        parse_size(size)


@pytest.mark.parametrize("device", ["meta", "cuda:99", "hpu", "xla", "vulkan", "\x1b[31m", "cuda:-1", ""])
def test_devices_that_hold_no_numbers(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", "hi", "--model", "lab", "--device", device]) == 2
    err = capsys.readouterr().err
    assert "device" in err
    assert err.count("\n") == 1
    assert "\x1b" not in err


@pytest.mark.parametrize("ends", ["x", 1.5, [1, "x"], {"a": 1}, True, [None]])
def test_ends_that_are_no_tokens(ends: Any) -> None:
    loaded = load_model(tiny.folder() / "model", device="cpu")
    loaded.model.generation_config.eos_token_id = ends
    with pytest.raises(FormatError, match="eos_token_id of the model's generation config"):
        generate(loaded.model, loaded.tokenizer, ["hi"], decoding=Decoding(max_new_tokens=1))


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "repetition_penalty"])
@pytest.mark.parametrize("value", ["hot", float("nan"), [0.7], True])
def test_a_generation_config_that_holds_no_numbers(name: str, value: Any) -> None:
    loaded = load_model(tiny.folder() / "model", device="cpu")
    setattr(loaded.model.generation_config, name, value)
    with pytest.raises(FormatError, match=f"{name} of the model's generation config"):
        Decoding(sample=True).filled(loaded.model)
    assert torch.isfinite(torch.tensor(Decoding(sample=False).filled(loaded.model).max_new_tokens))
