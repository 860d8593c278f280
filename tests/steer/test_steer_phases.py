"""Interventions at phases: which tokens change in a running model, told by marker ids alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope import Scope, load_scope
from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.features import Continuations, SweepOptions, sweep
from qwen_scope.model import blocks
from qwen_scope.steer import (
    Decoding,
    Intervention,
    Recipe,
    Where,
    generate,
    load_recipe,
    next_token_kl,
    steering,
)
from qwen_scope.steer.measure import Row
from qwen_scope.text import PHASES

LAYER, FEATURE, AMOUNT = 0, 7, 3.0
PROMPTS = ["Hi there", "Is it warm today?", "1 + 1 ="]


def template(name: str) -> str:
    spec = find_spec("trl")
    path = Path(spec.origin or "").parent / "chat_templates" / f"{name}.jinja" if spec else Path("absent")
    if not path.is_file():
        pytest.skip("the templates lie in TRL's wheel")
    return path.read_text()


@pytest.fixture
def own() -> Scope:
    """A scope whose chat template may be changed."""
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")


def ids_of(scope: Scope, *texts: str) -> list[int]:
    return [int(str(scope.tokenizer.convert_tokens_to_ids(text))) for text in texts]


@contextmanager
def forced(scope: Scope, plan: Sequence[dict[int, int]]) -> Iterator[None]:
    """The model made to write certain tokens: per row of the batch, step to token id."""
    step = 0

    def choose(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        nonlocal step
        logits = logits.clone()
        logits[..., ids_of(scope, "<|im_end|>", "<|endoftext|>", "<think>", "</think>")] = -1e4
        for row, wanted in enumerate(plan):
            if step in wanted:
                logits[row, -1, wanted[step]] = 1e4
        step += 1
        return logits

    handle = scope.model.lm_head.register_forward_hook(choose)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watched(scope: Scope) -> Iterator[list[torch.Tensor]]:
    """What every forward pass changes between the output of the block and the input of the next one."""
    layers, before, moved = blocks(scope.model), [], []

    def out(module: torch.nn.Module, args: object, output: object) -> None:
        before.append(output[0] if isinstance(output, tuple) else output)

    def into(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        moved.append(h - before.pop())

    handles = [
        layers[LAYER].register_forward_hook(out),
        layers[LAYER + 1].register_forward_pre_hook(into, with_kwargs=True),
    ]
    try:
        yield moved
    finally:
        for handle in handles:
            handle.remove()


def phases_by_markers(scope: Scope, row: Sequence[int], prompt: int, opened: bool) -> list[str]:
    """One user message, then an answer: the rule in words, from marker ids and spaces alone."""
    start, opens, closes = ids_of(scope, "<|im_start|>", "<think>", "</think>")
    last = max(i for i in range(prompt) if row[i] == start)  # the generation prompt
    out, phase, after = [], "thinking" if opened else "answer", False
    for i, token in enumerate(row):
        if i < last:
            out.append("user")
            continue
        space = str(scope.tokenizer.decode([token])).isspace()
        if phase == "answer" and token == opens:
            phase = "thinking"
        out.append("thinking" if phase == "thinking" or (after and space) else "answer")
        after = after and space
        if phase == "thinking" and token == closes:
            phase, after = "answer", True
    return out


def belongs(where: str, phases: list[str], prompt: int) -> list[bool]:
    """Restated per token, from the text of `where`."""
    out = []
    for i, phase in enumerate(phases):
        half = "prompt" if i < prompt else "generated"
        out.append(any(part in ("all", half, phase, f"{half}:{phase}") for part in where.split(",")))
    return out


CASES = [("lab", "default", False), ("qwen3", "thinking", False), ("qwen3_6", "thinking", True)]


@pytest.mark.parametrize(
    "where", ["thinking", "answer", "user", "generated:thinking,user", "generated:answer", "generated"]
)
@pytest.mark.parametrize(("name", "chat", "opened"), CASES)
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_tokens_that_change(own: Scope, where: str, name: str, chat, opened: bool, chunk: int | None) -> None:
    """A batch with left padding whose rows open and close their thinking at different steps, under a KV cache."""
    if name != "lab":
        own.tokenizer.chat_template = template(name)
    opens, closes = ids_of(own, "<think>", "</think>")
    space, word = (own.tokenizer(text)["input_ids"][0] for text in ("\n", "u"))
    plan = [{2: closes, 3: space, 5: word}, {1: closes, 2: word}, {5: closes, 6: space, 7: space, 8: word}]
    if not opened:
        plan = [{0: opens, **plan[0]}, {0: opens, 3: closes, 4: word}, {1: opens, **plan[2]}]
    new = 10
    lengths = own.tokenize(PROMPTS, chat=chat).lengths
    order = sorted(range(3), key=lambda i: lengths[i])  # a batch runs in this order
    one = Intervention.add(layer=LAYER, feature=FEATURE, amount=AMOUNT, where=where)
    with watched(own) as moved, forced(own, _shifted(plan, max(lengths), chunk, order)):
        found = generate(
            own.model, own.tokenizer, PROMPTS, [one], saes=own.saes, chat=chat,
            decoding=Decoding(new, prefill_chunk=chunk),
        )  # fmt: skip
    changed = torch.cat(moved, 1).abs().amax(-1) > 0
    assert changed.shape == (3, max(lengths) + new - 1)
    for place, i in enumerate(order):
        made = [token.token_id for token in found[i].tokens]
        assert made.count(closes) == 1, "the model wrote what it was made to write"
        row = [*own.tokenize([PROMPTS[i]], chat=chat).input_ids[0].tolist(), *made][:-1]
        expected = belongs(where, phases_by_markers(own, row, lengths[i], opened), lengths[i])
        assert changed[place, max(lengths) - lengths[i] :].tolist() == expected
        assert 0 < sum(expected) < len(expected)


def _shifted(plan: list[dict[int, int]], longest: int, chunk: int | None, order: list[int]) -> list[dict[int, int]]:
    """Steps counted from the last forward pass over the prompt, in the order of the batch."""
    passes = 0 if chunk is None else -(-longest // chunk) - 1
    return [{step + passes: token for step, token in plan[i].items()} for i in order]


def test_draws_do_not_depend_on_the_batch(own: Scope) -> None:
    """Several draws of one prompt: each row follows its own text."""
    opens, closes = ids_of(own, "<think>", "</think>")
    one = Intervention.add(layer=LAYER, feature=FEATURE, amount=40.0, where="thinking")
    drawn = {"saes": own.saes, "chat": "default", "decoding": Decoding(8, sample=True, temperature=2.0, seed=3)}
    plan = [{0: opens}, {0: opens, 2: closes}, {1: opens, 4: closes}]
    with forced(own, plan):
        together = generate(own.model, own.tokenizer, ["Hi"] * 3, [one], **drawn)
    for i in range(3):
        with forced(own, plan[: i + 1]):
            alone = generate(own.model, own.tokenizer, ["Hi"] * (i + 1), [one], **drawn)
        assert alone[i].tokens == together[i].tokens
    assert len({one.text for one in together}) == 3


def test_teacher_forced_rows_are_steered_like_generated_ones(own: Scope) -> None:
    """KL along the unsteered text, against a run with the change written into a hook by hand."""
    opens, closes = ids_of(own, "<think>", "</think>")
    with forced(own, [{0: opens, 3: closes}]):
        (plain,) = generate(own.model, own.tokenizer, ["Hi there"], chat="default", decoding=Decoding(8))
    prompt = own.tokenize(["Hi there"], chat="default").input_ids[0].tolist()
    ids = [*prompt, *(token.token_id for token in plain.tokens)]
    phases = phases_by_markers(own, ids, len(prompt), opened=False)
    row = Row(tuple(ids), len(prompt), tuple(PHASES.index(phase) for phase in phases))
    one = Intervention.add(layer=LAYER, feature=FEATURE, amount=AMOUNT, where="thinking")
    (found,) = next_token_kl(own.model, [row], [one], own.saes)
    at = torch.tensor([phase == "thinking" for phase in phases])
    vector = AMOUNT * own.saes[LAYER].W_dec[:, FEATURE]

    def change(module: torch.nn.Module, args: object, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        h = h + at[None, :, None] * vector
        return (h, *output[1:]) if isinstance(output, tuple) else h

    with torch.no_grad():
        before = own.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        handle = blocks(own.model)[LAYER].register_forward_hook(change)
        after = own.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        handle.remove()
    kl = (before.exp() * (before - after)).sum(-1)[len(prompt) - 1 : -1]
    assert found == pytest.approx(kl.clamp(min=0).numpy(), abs=1e-5)
    assert found[:1] == pytest.approx([0.0], abs=1e-6)
    assert found[4] > 1e-5
    (plain_text,) = next_token_kl(own.model, [Row(tuple(ids), len(prompt))], [one], own.saes)
    assert plain_text == pytest.approx(np.zeros(8), abs=1e-6)


@pytest.mark.slow
def test_a_sweep_at_a_phase(own: Scope) -> None:
    """The continuation is an answer, so an intervention at thinking does nothing to it and one at answers does."""
    found = {}
    for where in ("thinking", "answer"):
        one = Intervention.add(layer=LAYER, feature=FEATURE, amount=1.0, unit="raw", where=where)
        made = sweep(
            own,
            PROMPTS,
            [one],
            Continuations(("Hello you",)),
            SweepOptions((20.0,), refine=0),
            chat="default",
            decoding=Decoding(4),
        )
        found[where] = [dose.effect.estimate for dose in made.doses]
    assert found["thinking"][0] == pytest.approx(found["thinking"][1], abs=1e-6)
    assert abs(found["answer"][0] - found["answer"][1]) > 1e-3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("thinking", "thinking"),
        ("user, thinking", "user,thinking"),
        ("answer,thinking,0-3", "thinking,answer,0-3"),
        ("generated:answer", "generated:answer"),
        ("prompt:answer,generated:answer", "answer"),
        ("prompt:user", "user"),
        ("generated,answer", "generated,answer"),
        ("generated,prompt:thinking", "generated,thinking"),
        ("prompt,tool_call", "prompt,tool_call"),
        ("all,thinking", "all"),
        ("prompt:thinking,answer", "answer,prompt:thinking"),
    ],
)
def test_spellings(text: str, says: str) -> None:
    where = Where.parse(text)
    assert str(where) == says
    assert Where.parse(says) == where
    one = Intervention.add(layer=0, feature=1, amount=1.0, where=text)
    assert Intervention.from_json(json.loads(json.dumps(one.to_json()))) == one


@pytest.mark.parametrize(
    "text", ["thinkng", "phase", "generated:", "generated:user", "prompt:all", "Thinking", ":user"]
)
def test_unreadable_phases(text: str) -> None:
    with pytest.raises(InputError) as error:
        Where.parse(text)
    assert "\n" not in str(error.value)


PARTS = st.lists(
    st.sampled_from(["prompt", "generated", "0", "3-5", *PHASES, *(f"prompt:{phase}" for phase in PHASES),
                     "generated:thinking", "generated:answer", "generated:tool_call", "generated:text"]),
    min_size=1, max_size=4,
)  # fmt: skip


@given(PARTS, PARTS)
def test_phases_as_sets(a: list[str], b: list[str]) -> None:
    """Every token of a table of positions, halves and phases, told by the words alone."""
    prompt, n = 4, 8
    first, second = Where.parse(",".join(a)), Where.parse(",".join(b))
    positions, lengths = torch.arange(n)[None], torch.tensor([[prompt]])
    possible = False
    for phase in PHASES:
        told = torch.full((1, n), PHASES.index(phase), dtype=torch.int8)
        sets = []
        for parts, where in ((a, first), (b, second)):
            text = ",".join(part for part in parts if not part[0].isdigit())
            expected = np.array(belongs(text, [phase] * n, prompt))
            never = phase in ("user", "system", "tool_result")
            if never:
                expected[prompt:] = "generated" in parts
            for span, tokens in (("0", [0]), ("3-5", [3, 4, 5])):
                if span in parts:
                    expected[tokens] = True
            assert where.mask(positions, lengths, told)[0].tolist() == expected.tolist(), (where, phase)
            sets.append(expected)
        possible |= bool((sets[0] & sets[1])[:prompt].any() or (sets[0] & sets[1])[prompt:].any())
    if possible:
        assert first.overlaps(second)
    assert first.overlaps(second) == second.overlaps(first)
    assert Where.parse(str(first)) == first


@pytest.mark.slow
def test_what_can_not_be_told_is_refused(own: Scope) -> None:
    def run(where: str, chat, prompts: Sequence = PROMPTS) -> None:
        one = Intervention.add(layer=LAYER, feature=FEATURE, amount=1.0, where=where)
        generate(own.model, own.tokenizer, prompts, [one], saes=own.saes, chat=chat, decoding=Decoding(2))

    with pytest.raises(InputError, match="a plain text has no token of the phase thinking"):
        run("thinking", None)
    run("text", None)
    with pytest.raises(InputError, match="a conversation has no token of the phase text"):
        run("text", "default")
    own.tokenizer.chat_template = template("qwen2_5")
    short = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]]
    with pytest.raises(InputError, match="no markers that tell thinking"):
        run("generated:thinking", "default", short)
    run("user,answer,system", "default", short)
    own.tokenizer.chat_template = "{% for m in messages %}{{ m.content | reverse }};{% endfor %}"
    with pytest.raises(InputError, match="phases can't be told"):
        run("answer", "default")
    one = Intervention.add(layer=LAYER, feature=FEATURE, amount=1.0, where="user")
    with pytest.raises(InputError, match="has to know the phases"), steering(own.model, [one], own.saes):
        own.model(torch.tensor([[1, 2, 3]]))


def test_two_changes_of_one_feature_at_different_phases(own: Scope) -> None:
    thinking, answer = (
        Intervention.clamp(layer=LAYER, feature=FEATURE, amount=1.0, where=where) for where in ("thinking", "answer")
    )
    options = {"saes": own.saes, "chat": "default", "decoding": Decoding(2)}
    generate(own.model, own.tokenizer, PROMPTS, [thinking, answer], **options)
    generated = Intervention.clamp(layer=LAYER, feature=FEATURE, amount=2.0, where="generated")
    with pytest.raises(InputError, match="set twice"):
        generate(own.model, own.tokenizer, PROMPTS, [thinking, generated], **options)


def test_recipes_and_the_command(scope: Scope, tmp_path: Path, capsys) -> None:
    one = Intervention.add(layer=LAYER, feature=FEATURE, amount=AMOUNT, where="generated:answer,user")
    Recipe.of("r", scope.model, [one], scope.saes).save(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml").interventions[0].where == one.where
    (expected,) = generate(
        scope.model, scope.tokenizer, ["Hi"], [one], saes=scope.saes, chat="default", decoding=Decoding(4)
    )
    lab = ("--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu", "--json")
    asked = ("steer", "Hi", *lab, "--recipe", str(tmp_path / "r.yaml"), "--max-new-tokens", "4")
    assert main([*asked, "--chat", "default"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["interventions"][0]["where"] == "user,generated:answer"
    assert data["steered"]["text"] == expected.text
    assert main(list(asked)) == 2
    assert "--chat default" in capsys.readouterr().err
