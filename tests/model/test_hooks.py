"""Reading and changing the stream: order, positions, clean-up, and contexts that don't mix."""

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from families import FAMILIES, N_LAYERS

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import HookPoint, blocks, capture, changing, reading, token_positions

ONE, TWO = HookPoint(1), HookPoint(2)


def ids(*shape, seed=0):
    return torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(seed))


def hook_count(model):
    """Hooks on any module, without those that transformers itself leaves once `output_hidden_states` was asked for."""
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return sum(not hook.__module__.startswith("transformers") for hook in hooks)


@torch.no_grad()
def logits(model, batch):
    return model(batch).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_is_what_the_next_block_receives(family, name):
    model, batch = family(name), ids(2, 5)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    received = []
    handle = blocks(model)[2].register_forward_pre_hook(lambda module, args: received.append(args[0]))
    try:
        before = capture(model, batch, [ONE])[ONE]
        with changing(model, {ONE: lambda h, point: h + direction}):
            changed = logits(model, batch)
    finally:
        handle.remove()
    assert torch.equal(received[-1], before + direction)
    assert not torch.allclose(changed, logits(model, batch))


def test_a_change_in_blocks_that_return_tuples():
    config = transformers.BloomConfig(vocab_size=256, hidden_size=32, n_layer=3, n_head=4)
    model, batch = transformers.BloomForCausalLM(config).eval(), ids(2, 5)
    before = capture(model, batch, [ONE])[ONE]
    received = []
    handle = model.transformer.h[2].register_forward_pre_hook(lambda module, args: received.append(args[0]))
    with changing(model, {ONE: lambda h, point: h + 1}), torch.no_grad():
        model(batch)
    handle.remove()
    assert torch.equal(received[0], before + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_change_gives_the_same_bits(family, name):
    model, batch = family(name), ids(2, 5)
    with changing(model, {HookPoint(i): lambda h, point: h for i in range(N_LAYERS)}):
        same = logits(model, batch)
    assert torch.equal(same, logits(model, batch))
    with changing(model, {}):
        assert torch.equal(logits(model, batch), same)


def test_changes_nest_in_the_order_opened_and_readers_see_what_is_there(qwen3):
    seen = {}
    batch = ids(1, 3)

    def keep(name):
        return lambda point, h: seen.__setitem__(name, h.clone())

    with (
        reading(qwen3, [ONE], keep("before")),
        changing(qwen3, {ONE: lambda h, point: h + 1}),
        changing(qwen3, {ONE: lambda h, point: h * 2}),
        reading(qwen3, [ONE], keep("after")),
    ):
        logits(qwen3, batch)
        captured = capture(qwen3, batch, [ONE])[ONE]
    assert torch.equal(seen["after"], (seen["before"] + 1) * 2)
    assert torch.equal(captured, seen["after"])
    assert torch.equal(capture(qwen3, batch, [ONE])[ONE], seen["before"])


def test_a_change_hears_which_hook_point_it_is_at(qwen3):
    heard = []

    def listen(h, point):
        heard.append(point)
        return h

    with changing(qwen3, {TWO: listen, ONE: listen}):
        logits(qwen3, ids(1, 2))
    assert heard == [ONE, TWO]


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_stay_right_in_generation(family, name):
    """Left padding, a KV cache and decoding token by token: position counts the sequence's own tokens."""
    model = family(name)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    steps = []

    def note(h, point):
        positions = token_positions()
        steps.append((h.shape[1], positions.expand(h.shape[0], -1).clone()))
        return h

    with changing(model, {ONE: note}), torch.no_grad():
        model.generate(
            ids(2, 5), attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
    assert [seq for seq, _ in steps] == [5, 1, 1]
    assert steps[0][1][0, 2:].tolist() == [0, 1, 2]
    assert steps[0][1][1].tolist() == [0, 1, 2, 3, 4]
    assert [step[1].tolist() for step in steps[1:]] == [[[3], [5]], [[4], [6]]]
    assert token_positions() is None


def test_a_change_has_to_keep_shape_and_dtype(qwen3):
    for bad in (lambda h, p: h[:, :1], lambda h, p: h.double(), lambda h, p: None, lambda h, p: h.to("meta")):
        with (
            pytest.raises(InputError, match="it has to keep shape, dtype and device"),
            changing(qwen3, {ONE: bad}),
        ):
            logits(qwen3, ids(1, 3))
    assert hook_count(qwen3) == 0


class Boom(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, Boom, KeyboardInterrupt])
def test_no_hook_is_left_after_an_exception(error):
    model = FAMILIES["qwen3"]()

    def fail(*_):
        raise error

    for use in (
        lambda: reading(model, [ONE, TWO], fail),
        lambda: changing(model, {ONE: lambda h, p: h, TWO: fail}),
    ):
        with pytest.raises(error), use():
            logits(model, ids(1, 2))
        with pytest.raises(error), use():
            raise error
        assert hook_count(model) == 0
    blocks(model)[2].register_forward_pre_hook(fail)
    with pytest.raises(error):
        capture(model, ids(1, 2), [HookPoint(3)])
    assert hook_count(model) == 1  # the one set here
    with pytest.raises(NotFoundError):
        capture(model, ids(1, 2), [ONE, HookPoint(9)])
    assert hook_count(model) == 1


def test_a_hook_point_never_reached_is_an_error(qwen3):
    with (
        pytest.raises(InputError, match=r"layers\.1\.resid_post was never reached: .* did not run"),
        changing(qwen3, {ONE: lambda h, p: h}),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"layers\.2\.resid_post was never reached"),
        changing(qwen3, {ONE: lambda h, p: h, TWO: lambda h, p: h}),
    ):
        capture(qwen3, ids(1, 2), [ONE])  # stops before layer 2
    model = FAMILIES["qwen3"]()
    bypassed = blocks(model)[2]
    blocks(model)[2].__class__ = type(
        "Bypassed", (type(bypassed),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)}
    )
    with pytest.raises(InputError, match=r"layers\.2\.resid_post was never reached"):
        capture(model, ids(1, 2), [TWO])
    assert hook_count(model) == 0


def test_compiled_models_are_refused():
    pytest.importorskip("torch._dynamo")
    model = FAMILIES["qwen3"]()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(InputError, match="is compiled"):
        capture(compiled, ids(1, 2), [ONE])
    assert capture(model, ids(1, 2), [ONE])[ONE].shape == (1, 2, 32)
    blocks(model)[1].compile(backend="eager")
    with pytest.raises(InputError, match="Qwen3DecoderLayer is compiled"):
        capture(model, ids(1, 2), [ONE])
    assert capture(model, ids(1, 2), [HookPoint(0)])[HookPoint(0)].shape == (1, 2, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_moe"])
def test_threads_do_not_mix_captures(family, name):
    model, workers, rounds = family(name), 6, 8
    batches = [ids(1, 4 + i, seed=i) for i in range(workers)]
    points = [[HookPoint(i % N_LAYERS), HookPoint((i + 1) % N_LAYERS)] for i in range(workers)]
    expected = [capture(model, batch, wanted) for batch, wanted in zip(batches, points, strict=True)]
    together = threading.Barrier(workers, timeout=120)  # a failure must not hang the others

    def work(i):
        for _ in range(rounds):
            together.wait()
            seen = capture(model, batches[i], points[i])
            assert list(seen) == points[i]
            for point in points[i]:
                assert torch.equal(seen[point], expected[i][point])

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    assert hook_count(model) == 0


@pytest.mark.slow
def test_threads_do_not_feel_each_others_changes(qwen3):
    batch, workers = ids(1, 5), 4
    amounts = [0.0, 1.0, -2.0, 5.0]
    expected = []
    for amount in amounts:
        with changing(qwen3, {ONE: lambda h, p, amount=amount: h + amount}):
            expected.append(logits(qwen3, batch))
    together = threading.Barrier(workers, timeout=120)  # a failure must not hang the others

    def work(i):
        for _ in range(8):
            together.wait()
            with changing(qwen3, {ONE: lambda h, p: h + amounts[i]}):
                together.wait()  # all hooks are in place at once
                assert torch.equal(logits(qwen3, batch), expected[i])

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    assert torch.equal(logits(qwen3, batch), expected[0])


def test_a_thread_joins_only_with_the_context_in_hand(qwen3):
    batch, plain = ids(1, 5), logits(qwen3, ids(1, 5))
    with changing(qwen3, {ONE: lambda h, p: h + 1}), ThreadPoolExecutor(1) as pool:
        here = logits(qwen3, batch)
        assert torch.equal(pool.submit(logits, qwen3, batch).result(), plain)
        assert torch.equal(pool.submit(contextvars.copy_context().run, logits, qwen3, batch).result(), here)
    assert not torch.equal(here, plain)


def test_a_block_held_open_by_a_generator_can_close_elsewhere(qwen3):
    def stream():
        with changing(qwen3, {ONE: lambda h, p: h}):
            yield logits(qwen3, ids(1, 2))
            yield logits(qwen3, ids(1, 2))

    steps = stream()
    next(steps)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(steps.close).result()
    assert hook_count(qwen3) == 0


def test_a_generator_resumed_in_another_context_is_refused(qwen3):
    """Its hooks are not felt there, so that its last figures would pass for changed ones."""

    def stream():
        with changing(qwen3, {ONE: lambda h, p: h + 1}):
            for _ in range(2):
                yield logits(qwen3, ids(1, 2))

    steps = stream()
    next(steps)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(next, steps).result()
        with pytest.raises(InputError, match="another thread or task"):
            pool.submit(next, steps).result()
    assert hook_count(qwen3) == 0
    assert len(list(stream())) == 2
