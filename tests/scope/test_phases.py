"""Features by phase of a conversation: the same tokens as by hand, and a phase that is not there is said."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen_scope import load_scope
from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.text import Counted

TALK = [
    {"role": "user", "content": "Wo ist der Bahnhof?"},
    {"role": "assistant", "reasoning_content": "the station", "content": "Der Zug kommt."},
]


@pytest.fixture(scope="module")
def scope():
    return load_scope("lab", device="cpu", counted=Counted.everything())


def test_a_conversation_is_read_once_and_every_token_has_its_phase(scope) -> None:
    seen = scope.features([TALK], [2], chat="default")
    text, strings, phases, turns = seen.texts[0], seen.tokens[0], seen.phases(0), seen.turns(0)
    assert "".join(strings) == text
    assert text == scope.tokenizer.apply_chat_template(TALK, tokenize=False)
    ends = np.cumsum([len(s) for s in strings])
    for content, phase, turn in (("Bahnhof", "user", 0), ("Zug", "answer", 1)):
        at = text.index(content)
        covering = [i for i, end in enumerate(ends) if end > at and end - len(strings[i]) < at + len(content)]
        assert {phases[i] for i in covering} == {phase}
        assert {turns[i] for i in covering} == {turn}


def test_ranking_a_phase_is_ranking_its_tokens(scope) -> None:
    seen = scope.features([TALK], [2], chat="default")
    where = [i for i, phase in enumerate(seen.phases(0)) if phase == "user"]
    dense = seen.of(0, 2).to_dense()[where].numpy()
    best = seen.strongest(0, 2, phases=["user"])
    want = {int(f): float(dense[:, f].max()) for f in np.flatnonzero(dense.max(0))}
    assert {one.feature: pytest.approx(one.maximum) for one in best} == want
    assert all(one.position in where for one in best)
    assert best[0].rate == pytest.approx((dense[:, best[0].feature] > 0).mean())
    with pytest.raises(InputError, match="no token of the text is of the phase tool_call"):
        seen.strongest(0, 2, phases=["tool_call"])
    for bad in (["loud"], [], "loud"):
        with pytest.raises(InputError, match="phase"):
            seen.strongest(0, 2, phases=bad)
    with pytest.raises(InputError, match="there is no text 1"):
        seen.phases(1)


def test_two_conversations_are_compared_in_one_phase(scope) -> None:
    other = [{"role": "user", "content": "Where is it?"}, *TALK[1:]]
    found = scope.compare([TALK], [other], [2], n=None, phases=["user"], chat="default")[2]
    seen = scope.features([TALK, other], [2], chat="default")
    dense = []
    for i in range(2):
        where = [j for j, phase in enumerate(seen.phases(i)) if phase == "user"]
        dense.append((seen.of(i, 2).to_dense()[where] > 0).double().mean(0))
    for one in found:
        assert one.rate_a == pytest.approx(float(dense[0][one.feature]))
        assert one.rate_b == pytest.approx(float(dense[1][one.feature]))
    with pytest.raises(InputError, match="nothing is left of the first"):
        scope.compare([TALK], [other], [2], phases=["tool_result"], chat="default")


@pytest.mark.slow
def test_the_command_shows_the_tokens_of_a_phase(capsys) -> None:
    words = ["features", "hi there", "--model", "lab", "--layer", "2", "--chat", "non_thinking", "--json"]
    assert main([*words, "--phase", "all"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert {token["phase"] for token in tokens} == {"user", "thinking"}
    assert main([*words, "--phase", "thinking"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == [t for t in tokens if t["phase"] == "thinking"]
    assert main(words) == 0
    assert "phase" not in json.loads(capsys.readouterr().out)["tokens"][0]
    for phase, said in (("tool_call", "this text has user, thinking"), ("loud", "a phase is one of")):
        assert main([*words, "--phase", phase]) == 2
        assert said in capsys.readouterr().err
