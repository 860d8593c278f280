"""What the text room's tests share."""

from __future__ import annotations

import pytest
from byte_tokenizer import byte_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()
