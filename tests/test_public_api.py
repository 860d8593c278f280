"""The names a stranger may rely on. Adding one is a decision; taking one away breaks somebody."""

from __future__ import annotations

import pytest

import qwen_scope
from qwen_scope.cli.app import app

ROOT_NAMES = {
    "FeatureActs",
    "FeatureStore",
    "HookPoint",
    "Intervention",
    "Scope",
    "catalog",
    "load_sae",
    "load_scope",
    "save_sae",
}
COMMANDS = {
    "demo",
    "catalog",
    "plan",
    "convert",
    "features",
    "compare",
    "steer",
    "sweep",
    "validate",
    "extract",
    "store",
    "find",
    "show",
    "export",
    "label",
    "analyze",
    "classify",
    "lab",
    "train",
    "eval",
    "explore",
    "posttrain",
    "synthesize",
}


def test_the_root_offers_exactly_these_names() -> None:
    assert set(qwen_scope.__all__) == ROOT_NAMES


@pytest.mark.parametrize("name", sorted(ROOT_NAMES))
def test_each_name_can_be_had(name: str) -> None:
    assert getattr(qwen_scope, name) is not None


def test_the_commands_are_these() -> None:
    named = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert named == COMMANDS
