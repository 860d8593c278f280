"""The monitor's numbers equal brute force, its file and logs hold them, and training is the same with and without."""

from __future__ import annotations

import numpy as np
import posttrain_tiny as small
import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import HookPoint, capture
from qwen_scope.posttrain import Activity, Monitor, ProbePrompts, monitor_figures, read_monitor
from qwen_scope.posttrain.answers import read, rise_in_generation

PROBE = tiny.TEXTS[:4]
ASKED = ProbePrompts(tiny.TEXTS[:3], max_new_tokens=6, at_start=2)
WATCH = {0: [3, 17], 2: [40]}
LABELS = {(2, 40): "weather"}
RUN = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.5}


class Logged(TrainerCallback):
    """A logger of the trainer, as TensorBoard's is one."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.lines.append({"step": state.global_step, **logs})


def run(tmp_path, monitor=None, **more):
    """Plain fine-tuning under a monitor, and what a logger saw."""
    policy, tokenizer = small.model()
    logged = Logged()
    trainer = small.FeatureSFTTrainer(
        policy,
        small.config(tmp_path / "run", **RUN | more),
        train_dataset=small.Dataset.from_list([{k: r[k] for k in ("prompt", "completion")} for r in small.ROWS]),
        processing_class=tokenizer,
        callbacks=[logged],
    )
    if monitor is not None:
        monitor.attach(trainer)
    trainer.train()
    return trainer, logged.lines


def make(tmp_path, **more) -> Monitor:
    return Monitor(small.saes(), small.model()[1], PROBE, tmp_path / "watch", **more)


def test_activity_is_brute_force(tmp_path) -> None:
    policy, tokenizer = small.model()
    found = make(tmp_path).measure(policy)
    for layer, sae in small.saes().items():
        rows = []
        for text in PROBE:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            rows.append(sae.encode(capture(policy, ids, [HookPoint(layer)])[HookPoint(layer)][0]).to_dense().numpy())
        tokens = np.concatenate(rows)
        np.testing.assert_allclose(found[layer].rate, (tokens > 0).mean(0), atol=1e-9)
        np.testing.assert_allclose(found[layer].mean, tokens.mean(0), atol=1e-4)
        np.testing.assert_allclose(found[layer].spread, np.std([row.mean(0) for row in rows], axis=0), atol=1e-3)


def test_effect_and_drift() -> None:
    start = Activity(np.array([0.5, 0.5, 0.0]), np.array([3.0, 4.0, 0.0]), np.array([1.0, 3.0, 0.0]))
    now = Activity(np.array([0.5, 0.5, 0.1]), np.array([5.0, 4.0, 1.0]), np.array([1.0, 3.0, 0.0]))
    assert start.effect(now).tolist() == [1.0, 0.0, 0.5]  # by the median spread, 2, but for the second
    assert start.drift(now) == pytest.approx(1 - 31 / (5 * 42**0.5))
    assert start.drift(start) == pytest.approx(0.0, abs=1e-12)


def test_what_answers_hold_is_brute_force() -> None:
    """Each answer alone, unpadded; an answer of no token holds nothing."""
    policy, tokenizer = small.model()
    rows = [tokenizer(text)["input_ids"] for text in tiny.TEXTS[:4]]
    begins = [2, 5, len(rows[2]), 3]
    features = {"weather": {0: [3, 17], 2: [40]}, "alone": {0: [5]}}
    found = read(policy, small.saes(), features, rows, begins)
    dense = {layer: [] for layer in small.saes()}
    for ids, begin in zip(rows, begins, strict=True):
        for layer, sae in small.saes().items():
            h = capture(policy, torch.tensor([ids]), [HookPoint(layer)])[HookPoint(layer)][0]
            dense[layer].append(sae.encode(h).to_dense().double().numpy()[begin:])
    unit = {layer: np.concatenate(some)[np.concatenate(some) > 0].mean() for layer, some in dense.items()}
    for i in (0, 1, 3):
        first, second = dense[0][i].mean(0) / unit[0], dense[2][i].mean(0) / unit[2]
        assert found["weather"][i] == pytest.approx((first[3] + first[17] + second[40]) / 3, abs=1e-4)
        assert found["alone"][i] == pytest.approx(first[5], abs=1e-4)
    assert found["weather"][2] == found["alone"][2] == 0.0


def test_the_rise_in_generation_is_a_test_of_two_proportions() -> None:
    """Against statsmodels' formula, restated: of 100 answers 2 lie beyond the bar at the start, of 40 later 8."""
    start, now = np.arange(100.0), np.concatenate((np.zeros(32), np.full(8, 200.0)))
    rate, before, after = 10 / 140, 2 / 100, 8 / 40
    assert rise_in_generation(start, now) == pytest.approx(
        (after - before) / (rate * (1 - rate) * (1 / 100 + 1 / 40)) ** 0.5
    )
    assert rise_in_generation(start, np.zeros(40)) < 0
    assert rise_in_generation(np.zeros(10), np.zeros(10)) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, ASKED])
def test_a_run_is_watched_and_left_as_it_is(tmp_path, asked) -> None:
    monitor = make(tmp_path, watch=WATCH, labels=LABELS, probe_prompts=asked, every=2, alarm=0.01, drift_alarm=0.5)
    watched, lines = run(tmp_path, monitor)
    plain, _ = run(tmp_path)
    for a, b in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    found = read_monitor(monitor.path)
    assert [line["step"] for line in found] == [0, 2, 4]
    assert all(entry["drift"] == pytest.approx(0, abs=1e-9) for entry in found[0]["layers"])
    assert not found[0]["alarms"]
    last = found[-1]["layers"]
    assert [[one["feature"] for one in entry["watched"]] for entry in last] == [[3, 17], [40]]
    assert last[1]["watched"][0]["label"] == "weather"
    now = monitor.measure(watched.model)
    assert last[0]["drift"] == pytest.approx(monitor.start[0].drift(now[0]))
    assert last[1]["watched"][0]["mean"] == pytest.approx(now[2].mean[40])
    alarms = [(alarm["layer"], alarm["concept"]) for line in found for alarm in line["alarms"]]
    assert alarms, "half a unit of learning rate moves something"
    assert not found[1]["alarms"] or all(alarm["layer"] is not None for alarm in found[1]["alarms"]), (
        "once is not twice"
    )
    assert len(set(alarms)) == len(alarms), "an alarm is raised once"
    logged = {name for line in lines for name in line if name.startswith("monitor/")}
    assert {"monitor/drift_0", "monitor/drift_2", "monitor/mean_2_40", "monitor/alarms"} <= logged
    figures = monitor_figures(found)
    assert [line.name for line in figures[1].lines] == ["layer 0 feature 3", "layer 0 feature 17", "weather"]
    assert list(figures[0].lines[0].y) == [line["layers"][0]["drift"] for line in found]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("way", ["lora", "checkpointing", "bf16"])
def test_answers_are_read_however_the_model_is_trained(tmp_path, way) -> None:
    policy, tokenizer = small.model()
    monitor = make(tmp_path, watch=WATCH, labels=LABELS, probe_prompts=ASKED, every=2)
    more = {"lora": {}, "checkpointing": {"activation_checkpointing": True}, "bf16": {"bf16": True}}[way]
    trainer = small.FeatureSFTTrainer(
        policy,
        small.config(tmp_path / "run", **RUN | more),
        train_dataset=small.Dataset.from_list([{k: r[k] for k in ("prompt", "completion")} for r in small.ROWS]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if way == "lora" else None,
    )
    monitor.attach(trainer)
    trainer.train()
    lines = read_monitor(monitor.path)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(isinstance(one["rise_in_generation"], float) for line in lines for one in line["concepts"])
    assert trainer.model.training


def test_a_concept_is_beyond_twice_in_a_row_before_it_raises_an_alarm_once(tmp_path) -> None:
    """Two features of one label at two layers, and one without a label."""
    labels = {(0, 3): "rude", (2, 40): "rude"}
    monitor = make(tmp_path, watch=WATCH, labels=labels, alarm=1.0)

    def step(at: int, rude: tuple[float, float], alone: float) -> list[str | None]:
        watched = [[(3, rude[0]), (17, alone)], [(40, rude[1])]]
        layers = [
            {
                "layer": layer,
                "drift": 0.0,
                "watched": [{"feature": f, "label": labels.get((layer, f)), "effect": e} for f, e in some],
            }
            for layer, some in zip((0, 2), watched, strict=True)
        ]
        return [one["concept"] for one in monitor._alarms(layers, monitor._concepts(layers, {}), at)]

    assert step(1, (3.0, 0.0), 0.0) == []  # the mean is beyond, for the first time
    assert step(2, (1.0, 0.5), 2.0) == []  # one feature alone is not the concept
    assert step(3, (3.0, 0.0), -2.0) == []  # beyond twice, but in opposite directions
    assert step(4, (1.5, 1.5), -2.0) == ["rude", "layer 0 feature 17"]
    assert step(5, (3.0, 3.0), -3.0) == []


def test_a_concept_that_is_written_twice_in_a_row_raises_an_alarm(tmp_path) -> None:
    monitor = make(tmp_path, watch={2: [40]}, labels=LABELS, probe_prompts=ASKED, rise_in_generation=3.0)
    monitor.start_answers = {"weather": np.linspace(0, 1, 100)}
    quiet, loud = np.linspace(0, 1, 30), np.full(30, 2.0)
    entry = {"layer": 2, "drift": 0.0, "watched": [{"feature": 40, "label": "weather", "effect": 0.0}]}

    def step(at: int, answers: np.ndarray) -> list[str | None]:
        concepts = monitor._concepts([entry], {"weather": answers})
        return [one["concept"] for one in monitor._alarms([entry], concepts, at)]

    assert [step(1, quiet), step(2, loud), step(3, quiet), step(4, loud)] == [[], [], [], []]
    assert step(5, loud) == ["weather"]
    assert step(6, loud) == []


def test_the_most_moved_come_first_when_all_are_watched(tmp_path) -> None:
    monitor = make(tmp_path, every=4, top=5)
    trainer, _ = run(tmp_path, monitor)
    now = monitor.measure(trainer.model)
    effect = np.abs(monitor.start[2].effect(now[2]))
    moved = read_monitor(monitor.path)[-1]["layers"][1]["moved"]
    assert [abs(one["effect"]) for one in moved] == pytest.approx(np.sort(effect)[::-1][:5])


def test_measurements_keep_to_their_share_of_the_time(tmp_path) -> None:
    """A clock that ticks: a measurement takes 3 ticks here, a step 10; the first, the last and all between take 2%."""
    now = [0.0]

    def clock() -> float:
        return now[0]

    monitor = make(tmp_path, share=0.02, clock=clock)
    policy, _ = small.model()
    slow, taken = monitor.measure, []

    def measure(model):
        now[0] += 3.0
        taken.append(now[0])
        return slow(model)

    monitor.measure = measure  # type: ignore[method-assign]
    monitor.out.mkdir(parents=True)
    monitor._measure(policy, 0)
    for step in range(1, 101):
        now[0] += 10.0
        if monitor._due(step):
            monitor._measure(policy, step)
    assert 3.0 * (len(taken) + 1) <= 0.02 * now[0] < 3.0 * (len(taken) + 2), "with one at the end; no more would fit"


def test_the_many_answers_of_the_start_do_not_put_off_what_follows(tmp_path) -> None:
    """Texts take 1 tick and the answers of a turn 4, two turns at the start: it costs 9 ticks, every later one 5."""
    now = [0.0]
    monitor = make(tmp_path, watch=WATCH, probe_prompts=ASKED, share=0.02, clock=lambda: now[0])
    policy, _ = small.model()
    texts, answers = monitor.measure, monitor.answers

    def measure(model):
        now[0] += 1.0
        return texts(model)

    def answer(model):
        now[0] += 4.0 * (1 if monitor.start_answers else ASKED.at_start)
        return answers(model)

    monitor.measure, monitor.answers = measure, answer  # type: ignore[method-assign]
    monitor.out.mkdir(parents=True)
    monitor._measure(policy, 0)
    due = []
    for step in range(1, 2001):
        now[0] += 1.0
        if monitor._due(step):
            due.append(now[0])
            monitor._measure(policy, step)
    first = (9 + 5 + 5) / 0.02  # with itself and the one at the end
    assert due[0] == pytest.approx(first, abs=1.0)
    assert due[1] == pytest.approx(first + 5 / 0.02, abs=1.0)


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_step_0(tmp_path) -> None:
    watched = {"watch": WATCH, "labels": LABELS, "probe_prompts": ASKED, "every": 1}
    monitor = make(tmp_path, **watched)
    run(tmp_path, monitor, save_strategy="steps", save_steps=2, max_steps=2)
    again = make(tmp_path, **watched)
    policy, tokenizer = small.model()
    trainer = small.FeatureSFTTrainer(
        policy,
        small.config(tmp_path / "run", **RUN),
        train_dataset=small.Dataset.from_list([{k: r[k] for k in ("prompt", "completion")} for r in small.ROWS]),
        processing_class=tokenizer,
    )
    again.attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert [line["step"] for line in read_monitor(again.path)] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(again.start[0].mean, monitor.start[0].mean)
    np.testing.assert_array_equal(again.start_answers["weather"], monitor.start_answers["weather"])
    assert len(again.start_answers["weather"]) == 2 * len(ASKED.prompts), "twice the prompts at the start"
    whole = make(tmp_path / "whole", **watched)
    run(tmp_path / "whole", whole)
    said = [[line["concepts"] for line in read_monitor(one.path)] for one in (again, whole)]
    assert said[0] == said[1], "answers after a break are those of a run without one"


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    _, tokenizer = small.model()
    with pytest.raises(InputError, match="at least two probe texts"):
        Monitor(small.saes(), tokenizer, ["one"], tmp_path)
    with pytest.raises(NotFoundError, match="no SAE for it"):
        make(tmp_path, watch={1: [0]})
    with pytest.raises(InputError, match="feature 96 does not exist"):
        make(tmp_path, watch={0: [96]})
    with pytest.raises(InputError, match="every step or less often"):
        make(tmp_path, every=0)
    with pytest.raises(InputError, match="read by the features that are watched"):
        make(tmp_path, probe_prompts=ASKED)
    with pytest.raises(InputError, match="at least two prompts"):
        make(tmp_path, watch=WATCH, probe_prompts=ProbePrompts(["one"]))
    with pytest.raises(NotFoundError, match="a Monitor writes it"):
        read_monitor(tmp_path / "none.jsonl")
