"""Activations that wait to be fetched: what is kept, what has to go, and that nobody takes the rest for the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qwen_scope import load_scope
from qwen_scope.errors import InputError
from qwen_scope.serve import Admission, Ask, ModelFacts, Read, ServeSettings, answers
from qwen_scope.serve import readout as module
from qwen_scope.serve.readout import LOST, Pending, Readouts
from qwen_scope.steer import Where, signature

READ = Read((4,), 3, (), Where.parse("all"))


@pytest.fixture(scope="module")
def scope() -> Any:
    return load_scope("lab", device="cpu")


def keep(readouts: Readouts, scope: Any, ticket: str, positions: list[int], read: Read = READ) -> torch.Tensor:
    """Let so many rows of noise be read under a ticket; the rows."""
    h = torch.randn(len(positions), 128, generator=torch.Generator().manual_seed(positions[0])) * 20
    rows = np.arange(len(positions))
    readouts.keep([Pending(ticket, f"of {ticket}", read, rows, np.array(positions))], {4: h}, scope.saes)
    return h


def test_what_is_fetched_are_the_strongest_features_in_the_order_of_positions(scope: Any) -> None:
    readouts = Readouts()
    later = keep(readouts, scope, "a", [5, 6])
    first = keep(readouts, scope, "a", [0, 1, 2])
    dense = scope.saes[4].encode(torch.cat([first, later])).to_dense()
    named = Read.from_json({"features": ["4/7", f"4/{int(dense[0].argmax())}"]})
    keep(readouts, scope, "b", [0, 1, 2], named)
    found = readouts.take("a")["of a"]["4"]
    values, features = dense.topk(3)
    assert found["positions"] == [0, 1, 2, 5, 6]
    assert found["features"] == features.tolist()
    assert torch.allclose(torch.tensor(found["values"]), values, atol=1e-4)
    of_names = readouts.take("b")["of b"]["4"]
    assert of_names["features"] == [[feature for _, feature in named.features]] * 3
    assert torch.allclose(torch.tensor(of_names["values"]), dense[:3, of_names["features"][0]], atol=1e-4)
    assert readouts.take("a") == readouts.take("b") == {}
    assert readouts.held == 0


def test_what_had_to_go_is_said_when_it_is_fetched(scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest ticket goes as a whole, also what is read for it later: half an answer would look like a whole one."""
    monkeypatch.setattr(module, "MOST_BYTES", 10 * (module.ROW + 3 * module.NUMBER))
    readouts = Readouts()
    keep(readouts, scope, "old", list(range(6)))
    keep(readouts, scope, "new", list(range(6)))
    keep(readouts, scope, "old", [6])
    assert readouts.held == 1
    found = readouts.take("old")
    assert list(found) == [LOST]
    assert "took the room" in found[LOST]
    assert len(readouts.take("new")["of new"]["4"]["positions"]) == 6
    assert answers.activations([found, found], 1) == {"activations": [], LOST: found[LOST]}


def test_a_client_that_has_gone_leaves_nothing_behind(scope: Any) -> None:
    """Its request may go on for a step or more after its activations were dropped."""
    readouts = Readouts()
    keep(readouts, scope, "gone", [0, 1])
    readouts.drop("gone")
    keep(readouts, scope, "gone", [2])
    keep(readouts, scope, "stays", [0])
    assert readouts.held == 1
    for i in range(2 * module.MOST_TICKETS):
        readouts.drop(str(i))
    assert len(readouts._closed) == module.MOST_TICKETS


@pytest.mark.parametrize(
    ("read", "prompt", "new", "answers", "fits"),
    [
        ({"layers": [4], "top": 256, "where": "all"}, 30_000, 1_000, 1, True),
        ({"layers": [4], "top": 256, "where": "all"}, 30_000, 1_000, 8, False),
        ({"layers": [4], "top": 256, "where": "prompt"}, 1_000, 10**6, 1, True),
        ({"layers": [4], "top": 256, "where": "generated"}, 1_000, 10**6, 1, False),
        ({"layers": [4], "top": 256, "where": "5-9"}, 10**6, 10**6, 1, True),
        ({"features": [f"4/{i}" for i in range(900)]}, 100_000, 1, 1, False),
    ],
)
def test_a_read_that_could_not_be_kept_is_refused(
    scope: Any, read: dict[str, Any], prompt: int, new: int, answers: int, fits: bool
) -> None:
    settings = ServeSettings(sae=str(scope.saes.source), layers=(4,), read_layers=(4,))
    admission = Admission(settings, ModelFacts(6, 128, torch.float32, 10**7, signature(scope.model)))
    ask = Ask(read=Read.from_json(read))
    if fits:
        admission.admit(ask, prompt, new, answers)
    else:
        with pytest.raises(InputError, match="of which this server keeps 512; read fewer tokens"):
            admission.admit(ask, prompt, new, answers)
