"""Steered generation against the official demo's rule and transformers' own loop, and what must not go wrong."""

from __future__ import annotations

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from families import FAMILIES
from transformers import GenerationConfig

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.model import HookPoint, LayerStats, blocks, changing
from qwen_scope.sae import Identity, TopK
from qwen_scope.steer import (
    Decoding,
    Intervention,
    change_reference,
    generate,
    side_by_side,
    steering,
    stream,
)

PROMPT = "The weather is fine today."
NEW = 8


def plain_tokens(model, tokenizer, prompt: str, new: int = NEW, **options) -> list[int]:
    """transformers' own greedy loop, nothing of ours."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=1, pad_token_id=0, **options)
    row = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :].tolist()
    return row[: row.index(1)] if 1 in row else row


def ids_of(generation) -> list[int]:
    return [token.token_id for token in generation.tokens]


def run(scope, prompts, interventions=(), **options):
    options.setdefault("decoding", Decoding(max_new_tokens=NEW))
    return generate(scope.model, scope.tokenizer, prompts, interventions, saes=scope.saes, **options)


def hook_count(model) -> int:
    return sum(not h.__module__.startswith("transformers") for m in model.modules() for h in m._forward_hooks.values())


def demo_rule(sae, feature: int, strength: float, positions: str, also_generated: bool):
    """The official demo's hook, restated: prefill at the listed positions, decode if asked or listed."""
    listed = None
    if positions != "all":
        listed = set()
        for part in positions.split(","):
            first, _, last = part.partition("-")
            listed |= set(range(int(first), int(last or first) + 1))
    seen = 0

    def change(h: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        h = h.clone()
        vector = strength * sae.W_dec[:, feature].to(h.dtype)
        prefill = seen == 0
        for i in range(h.shape[1]):
            position = seen + i
            if listed is None or position in listed or (also_generated and not prefill):
                h[:, i] += vector
        seen += h.shape[1]
        return h

    return change


@pytest.mark.parametrize(
    ("positions", "also", "where"),
    [
        ("all", True, "all"),
        ("0,2,4-5", True, "0,2,4-5,generated"),
        ("0,2,4-5", False, "0,2,4-5"),
        ("1,9", False, "1,9"),
        ("3", True, "3,generated"),
    ],
)
@pytest.mark.parametrize("layer", [0, 2])
def test_the_demos_rule(scope, by_hand, layer, positions, also, where) -> None:
    model, sae = scope.model, scope.saes[layer]
    with by_hand(blocks(model)[layer], demo_rule(sae, 11, 6.0, positions, also)):
        expected = plain_tokens(model, scope.tokenizer, PROMPT)
    one = Intervention.add(layer=layer, feature=11, amount=6.0, where=where)
    (found,) = run(scope, [PROMPT], [one])
    assert ids_of(found) == expected
    assert expected != plain_tokens(model, scope.tokenizer, PROMPT), "the steering does something"


def test_unsteered_is_transformers_own_greedy(scope) -> None:
    (found,) = run(scope, [PROMPT])
    assert ids_of(found) == plain_tokens(scope.model, scope.tokenizer, PROMPT)
    (penalised,) = run(scope, [PROMPT], decoding=Decoding(max_new_tokens=NEW, repetition_penalty=1.7))
    assert ids_of(penalised) == plain_tokens(scope.model, scope.tokenizer, PROMPT, repetition_penalty=1.7)


def mixed_interventions(d_model: int = tiny.D_MODEL) -> list[Intervention]:
    direction = torch.randn(d_model, generator=torch.Generator().manual_seed(3))
    return [
        Intervention.add(layer=1, direction=direction, amount=2.0, where="generated,0"),
        Intervention.clamp(layer=2, feature=5, amount=3.0, where="prompt"),
        Intervention.scale(layer=2, feature=6, amount=-2.0),
        Intervention.add(layer=2, feature=7, amount=1.0, where="2-4"),
        Intervention.ablate(layer=2, direction=direction),
    ]


def family_sae(layer: int) -> TopK:
    sae = tiny.random_sae(layer)
    return TopK(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae.k)


@torch.no_grad()
def stepwise(model, ids: torch.Tensor, interventions, saes, new: int) -> tuple[list[int], torch.Tensor]:
    """Greedy without any cache: every step reruns the whole row, positions are simply columns."""
    prompt, steps = ids.shape[1], []

    def change(h: torch.Tensor, point: HookPoint) -> torch.Tensor:
        out = h.clone()
        for i in range(h.shape[1]):
            here = [
                one
                for one in interventions
                if one.hook_point == point
                and ((one.where.prompt and i < prompt) or (one.where.generated and i >= prompt) or _listed(one, i))
            ]
            out[:, i] = change_reference(here, h[:, i], saes.get(point.layer))
        return out

    points = {one.hook_point: change for one in interventions}
    with changing(model, points):
        for _ in range(new):
            logits = model(ids, use_cache=False).logits[:, -1]
            steps.append(logits)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, prompt:].tolist(), torch.cat(steps)


def _listed(one: Intervention, i: int) -> bool:
    return any(a <= i <= b for a, b in one.where.spans)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe_text", "gemma3_text"])
def test_every_family_with_cache_padding_and_chunks(name) -> None:
    """Left padding, a batch of unequal lengths and a KV cache give what single rows without a cache give."""
    model, saes = FAMILIES[name](), {2: family_sae(2)}
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, 250, (n,), generator=generator) for n in (3, 7, 5)]
    interventions = mixed_interventions()
    expected = [stepwise(model, row[None], interventions, saes, 5)[0] for row in rows]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    for chunk in (None, 3):
        if chunk and name.startswith("qwen3_5"):
            continue  # transformers feeds hybrid models their prompt in one piece
        config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, prefill_chunk_size=chunk)
        with steering(model, interventions, saes, prompt_lengths=[len(row) for row in rows]):
            out = model.generate(ids, attention_mask=mask, generation_config=config)
        assert out[:, width:].tolist() == expected, chunk
    plain = model.generate(ids, attention_mask=mask, generation_config=config)
    assert plain[:, width:].tolist() != expected


def test_batches_give_what_single_prompts_give(scope) -> None:
    prompts = ["a", PROMPT, "Guten Morgen! Wo ist", "车站在哪里"]
    together = run(scope, prompts, mixed_interventions(), candidates=3)
    for prompt, one in zip(prompts, together, strict=True):
        (alone,) = run(scope, [prompt], mixed_interventions(), candidates=3)
        assert (alone.text, ids_of(alone), alone.prompt) == (one.text, ids_of(one), prompt)
        assert [t.probability for t in alone.tokens] == pytest.approx([t.probability for t in one.tokens], rel=1e-3)
    few = run(scope, prompts, mixed_interventions(), candidates=3, batch_tokens=1)
    assert [g.text for g in few] == [g.text for g in together]


def test_probabilities_and_candidates_are_the_models(scope) -> None:
    interventions = mixed_interventions()
    (found,) = run(scope, [PROMPT], interventions, candidates=4)
    ids = scope.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens, logits = stepwise(scope.model, ids, interventions, {2: scope.saes[2]}, len(found.tokens))
    assert ids_of(found) == tokens
    for token, row in zip(found.tokens, logits.softmax(-1), strict=True):
        assert token.probability == pytest.approx(float(row.max()), rel=1e-3)
        top = row.topk(4)
        assert [c.token_id for c in token.candidates] == top.indices.tolist()
        assert [c.probability for c in token.candidates] == pytest.approx(top.values.tolist(), rel=1e-3)
    assert run(scope, [PROMPT])[0].tokens[0].probability is None


def test_probabilities_are_before_the_penalty(scope) -> None:
    decoding = Decoding(max_new_tokens=NEW, repetition_penalty=3.0, sample=True, temperature=0.1)
    (found,) = run(scope, [PROMPT], decoding=decoding, candidates=1)
    ids = scope.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for token in found.tokens:
        with torch.no_grad():
            row = scope.model(ids).logits[0, -1].softmax(-1)
        assert token.probability == pytest.approx(float(row[token.token_id]), rel=1e-3)
        ids = torch.cat([ids, torch.tensor([[token.token_id]])], 1)


SAMPLE = Decoding(max_new_tokens=12, sample=True, temperature=1.5, seed=7)


def test_sampling_has_a_seed_and_ignores_the_global_one(scope) -> None:
    first = run(scope, [PROMPT] * 3, decoding=SAMPLE)
    torch.manual_seed(99)
    assert run(scope, [PROMPT] * 3, decoding=SAMPLE) == first
    assert run(scope, [PROMPT] * 3, decoding=SAMPLE, batch_tokens=1) == first, "batches do not change the draws"
    assert len({g.text for g in first}) == 3, "each row has its own draws"
    other = Decoding(max_new_tokens=12, sample=True, temperature=1.5, seed=8)
    assert run(scope, [PROMPT] * 3, decoding=other) != first


@pytest.mark.slow
def test_draws_follow_the_distribution_that_transformers_would_draw_from(scope) -> None:
    """First tokens of many rows against temperature, top-k and top-p written out."""
    decoding = Decoding(max_new_tokens=1, sample=True, temperature=0.5, top_k=5, top_p=0.9, seed=3)
    n = 3000
    found = run(scope, ["a"] * n, decoding=decoding, batch_tokens=10**6)
    with torch.no_grad():
        logits = scope.model(scope.tokenizer("a", return_tensors="pt")["input_ids"]).logits[0, -1]
    best = (logits / 0.5).topk(5)
    p = best.values.softmax(-1)
    p = p * ((p.cumsum(-1) - p) < 0.9)
    p = p / p.sum()
    counts = torch.tensor([sum(ids_of(g) == [i] for g in found) for i in best.indices.tolist()])
    assert int(counts.sum()) == n
    torch.testing.assert_close(counts / n, p, atol=0.04, rtol=0)


def test_sampling_takes_the_models_own_settings(scope, monkeypatch) -> None:
    own = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    monkeypatch.setattr(scope.model, "generation_config", own)
    filled = Decoding(sample=True, top_k=3).filled(scope.model)
    assert (filled.temperature, filled.top_k, filled.top_p, filled.repetition_penalty) == (0.6, 3, 0.95, 1.05)
    (greedy,) = run(scope, [PROMPT])  # none of it touches greedy decoding
    assert ids_of(greedy) == plain_tokens(scope.model, scope.tokenizer, PROMPT)


def test_side_by_side(scope) -> None:
    steer = [Intervention.add(layer=0, feature=3, amount=8.0)]
    (both,) = side_by_side(
        scope.model, scope.tokenizer, [PROMPT], steer, saes=scope.saes, decoding=Decoding(max_new_tokens=NEW)
    )
    assert both.unsteered.text == run(scope, [PROMPT])[0].text
    assert both.steered.text == run(scope, [PROMPT], steer)[0].text
    assert len(both.steered.tokens[0].candidates) == 10


@pytest.mark.parametrize("chat", ["thinking", "non_thinking"])
def test_chat_template(scope, chat) -> None:
    (found,) = run(scope, ["hello"], chat=chat)
    expected = scope.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=chat == "thinking",
    )
    assert found.prompt == expected
    assert "".join(found.prompt_tokens) == expected


def test_pieces_join_to_the_text(scope) -> None:
    got: dict[int, str] = {}
    decoding = Decoding(max_new_tokens=30, sample=True, temperature=3.0)
    found = run(
        scope, ["a", "bc"], decoding=decoding, on_text=lambda i, piece: got.__setitem__(i, got.get(i, "") + piece)
    )
    for i, one in enumerate(found):
        assert got.get(i, "") == one.text == "".join(t.text for t in one.tokens)
        assert one.text == scope.tokenizer.decode(ids_of(one))


def test_a_stream_may_be_read_in_any_context(scope) -> None:
    """Its generation stays in the context it began in, whoever asks for the next piece."""
    decoding = Decoding(max_new_tokens=8)
    whole = run(scope, [PROMPT], mixed_interventions(), decoding=decoding)[0].text
    pieces = stream(lambda on_text: run(scope, [PROMPT], mixed_interventions(), decoding=decoding, on_text=on_text))
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(contextvars.Context().run, next, pieces, None).result() for _ in range(20)]
    assert "".join(piece[1] for piece in found if piece) == whole


def test_stream(scope) -> None:
    decoding = Decoding(max_new_tokens=20)
    pieces = list(stream(lambda on_text: run(scope, [PROMPT], decoding=decoding, on_text=on_text)))
    assert "".join(piece for _, piece in pieces) == run(scope, [PROMPT], decoding=decoding)[0].text
    cut = stream(lambda on_text: run(scope, [PROMPT], mixed_interventions(), on_text=on_text))
    next(cut)
    cut.close()
    assert hook_count(scope.model) == 0
    with pytest.raises(InputError, match="is empty"):
        list(stream(lambda on_text: run(scope, [""], on_text=on_text)))


def test_zero_and_never_active_give_the_same_bits(scope) -> None:
    ids = scope.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    seen = scope.features([PROMPT], [2]).of(0, 2).to_dense()
    silent = int((seen.sum(0) == 0).nonzero()[0])
    with torch.no_grad():
        plain = scope.model(ids).logits
        for one in (
            Intervention.add(layer=2, feature=3, amount=0.0),
            Intervention.add(layer=2, feature=3, amount=0.0, where="1-3"),
            Intervention.scale(layer=2, feature=silent, amount=5.0),
            Intervention.scale(layer=2, feature=silent, amount=5.0, where="prompt"),
            Intervention.ablate(layer=2, feature=silent),
            Intervention.ablate(layer=1, direction=[1.0] * tiny.D_MODEL, amount=0.0),
        ):
            with steering(scope.model, [one], scope.saes):
                assert torch.equal(scope.model(ids).logits, plain), one


def test_no_hook_is_left_after_an_exception(scope) -> None:
    def boom(row: int, piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scope, [PROMPT], mixed_interventions(), on_text=boom)
    with pytest.raises(ZeroDivisionError), steering(scope.model, mixed_interventions(), scope.saes):
        _ = 1 / 0
    assert hook_count(scope.model) == 0


@pytest.mark.slow
def test_threads_with_different_interventions_do_not_mix(scope) -> None:
    plans = [[], mixed_interventions(), [Intervention.add(layer=0, feature=3, amount=8.0)]]
    expected = [run(scope, [PROMPT], plan, decoding=SAMPLE) for plan in plans]
    together = threading.Barrier(len(plans), timeout=120)

    def work(i: int) -> None:
        for _ in range(4):
            together.wait()
            assert run(scope, [PROMPT], plans[i], decoding=SAMPLE) == expected[i]

    with ThreadPoolExecutor(len(plans)) as pool:
        list(pool.map(work, range(len(plans))))
    assert hook_count(scope.model) == 0


def test_resid_norm_through_generation(scope) -> None:
    point = HookPoint(0)
    stats = {0: LayerStats(point, 1, 5, "five tokens", 4.0, {0.5: 4.0})}
    raw = 0.5 * 4.0 / float(scope.saes[0].W_dec[:, 3].norm())
    (by_norm,) = run(
        scope, [PROMPT], [Intervention.add(layer=0, feature=3, amount=0.5, unit="resid_norm")], stats=stats
    )
    (by_hand_,) = run(scope, [PROMPT], [Intervention.add(layer=0, feature=3, amount=raw)])
    assert by_norm.text == by_hand_.text


def bad() -> list:
    d = tiny.D_MODEL
    return [
        (Intervention.add(layer=0, feature=tiny.D_SAE, amount=1), InputError, "feature 96 does not exist"),
        (Intervention.add(layer=1, feature=0, amount=1), NotFoundError, "no SAE for layer 1"),
        (Intervention.add(layer=9, direction=[1.0] * d, amount=1), NotFoundError, "no layer 9"),
        (Intervention.add(layer=1, direction=[1.0] * (d + 1), amount=1), MismatchError, "33 numbers"),
        (Intervention.ablate(layer=0, feature=1, where="5,99"), InputError, "position 99 is past the end"),
        (Intervention.add(layer=0, feature=1, amount=1, unit="resid_norm"), InputError, "needs the statistics"),
        (Intervention.add(layer=0, feature=1, amount=1, sae=Identity("x", 0, "y")), MismatchError, "made for the SAE"),
    ]


@pytest.mark.parametrize(("one", "error", "says"), bad(), ids=lambda x: x if isinstance(x, str) else None)
def test_bad_interventions_are_refused(scope, one, error, says) -> None:
    with pytest.raises(error, match=says) as caught:
        run(scope, [PROMPT], [one])
    assert "\n" not in str(caught.value)
    assert hook_count(scope.model) == 0


def test_contradictions_are_refused(scope) -> None:
    clamp = Intervention.clamp(layer=0, feature=1, amount=1.0, where="prompt")
    with pytest.raises(InputError, match="set twice"):
        run(scope, [PROMPT], [clamp, Intervention.ablate(layer=0, feature=1)])
    run(scope, [PROMPT], [clamp, Intervention.ablate(layer=0, feature=1, where="generated")])
    one, two = ([1.0] + [0.0] * 31), ([0.0] * 31 + [1.0])
    with pytest.raises(InputError, match="same amount"):
        run(
            scope,
            [PROMPT],
            [
                Intervention.ablate(layer=0, direction=one),
                Intervention.ablate(layer=0, direction=two, amount=0.5),
            ],
        )


def test_bad_prompts_and_settings(scope) -> None:
    with pytest.raises(InputError, match="is empty"):
        run(scope, [""])
    with pytest.raises(InputError, match="exceed the context of 64"):
        run(scope, ["a"], decoding=Decoding(max_new_tokens=64))
    for wrong in (
        {"max_new_tokens": 0},
        {"sample": True, "temperature": 0.0},
        {"sample": True, "temperature": float("nan")},
        {"sample": True, "top_p": 1.5},
        {"sample": True, "top_k": -1},
        {"temperature": 0.7},
        {"seed": -1},
        {"prefill_chunk": 0},
        {"repetition_penalty": 0.0},
    ):
        with pytest.raises(InputError):
            Decoding(**wrong)


def test_directions_are_removed_together_and_last(scope) -> None:
    """Two directions that are not orthogonal, and a feature that writes along one: nothing of either remains."""
    from qwen_scope.model import reading

    a, b = torch.randn(2, tiny.D_MODEL, generator=torch.Generator().manual_seed(1))
    b = a + 0.3 * b
    left = []
    interventions = [
        Intervention.ablate(layer=0, direction=a),
        Intervention.ablate(layer=0, direction=b),
        Intervention.add(layer=0, feature=3, amount=5.0),
    ]
    ids = scope.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with (
        steering(scope.model, interventions, scope.saes),
        reading(scope.model, [HookPoint(0)], lambda point, h: left.append(h)),
    ):
        scope.model(ids)
    for d in (a, b):
        assert float((left[0] @ (d / d.norm())).abs().max()) < 1e-4
