"""Commands around features and steering stay thin: few parameters each, and nothing that the library cannot do."""

from __future__ import annotations

import inspect

import pytest

from qwen_scope.cli import find, steer, sweep, validate


@pytest.mark.parametrize("command", [steer.steer, sweep.sweep, validate.validate, find.find])
def test_few_parameters(command) -> None:
    assert len(inspect.signature(inspect.unwrap(command)).parameters) <= 15
