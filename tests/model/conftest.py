"""What the model room's tests share: one thread (the models are tiny), and one model of each family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from families import FAMILIES
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def family() -> Callable[[str], PreTrainedModel]:
    """A tiny model by family name, built once and never changed."""
    return cache(lambda name: FAMILIES[name]())


@pytest.fixture
def qwen3(family) -> PreTrainedModel:
    return family("qwen3")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()
