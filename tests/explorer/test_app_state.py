"""What all visitors share: limits, what is remembered, sides of a comparison, labels and notes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from explored import ENGLISH, GERMAN, LAYER

from qwen_scope import load_scope
from qwen_scope.cli.sweep import read_prompts
from qwen_scope.errors import InputError, MismatchError, NotFoundError, QwenScopeError
from qwen_scope.explorer import AppState, Limits, steering
from qwen_scope.explorer.access.limits import whole_number
from qwen_scope.explorer.jobs import Jobs, Stopped, Told, watched
from qwen_scope.explorer.look.explore import Reading, address
from qwen_scope.explorer.look.feature import passage
from qwen_scope.explorer.presets import PRESETS
from qwen_scope.explorer.store_pool import StorePool
from qwen_scope.explorer.tabs.datasets import analysed
from qwen_scope.features import Label, Notes, make_label
from qwen_scope.files import text_lines
from qwen_scope.scope import model_source
from qwen_scope.stats import Interval


def test_what_was_read_lately_is_kept_by_bytes(state: AppState) -> None:
    one = AppState(state.scope)
    first = one.seen("Hello there", LAYER)
    assert one.seen("Hello there", LAYER) is first
    assert one.seen("Hello there", LAYER, "thinking") is not first
    small = AppState(state.scope, limits=Limits(remembered_bytes=one.remembered_bytes))
    for i in range(20):
        small.seen(f"Hello there, number {i}", LAYER)
        assert small.remembered_bytes <= small.limits.remembered_bytes


LABS = Path(model_source("lab")).parent / "sae"


def group_of(folder: Path, layers: dict[int, int], change: float = 1.0) -> Path:
    """A group of SAEs: those of the lab's layers under numbers of their own, their encoders multiplied by `change`."""
    for layer, source in layers.items():
        sae = torch.load(LABS / f"layer{source}.sae.pt", weights_only=True)
        sae["W_enc"] = sae["W_enc"] * change
        torch.save(sae, folder / f"layer{layer}.sae.pt")
    config = json.loads((LABS / "config.json").read_text())
    said = config.pop("fingerprints")  # of the weights before they were stored shorter
    if change == 1.0:
        config["fingerprints"] = {str(layer): said[str(source)] for layer, source in layers.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("layers", "change", "ours"),
    [
        ({4: 4, 5: 5}, 1.0, {4, 5}),
        ({4: 4}, 1.0, {4}),
        ({4: 4, 5: 5}, 1.01, set()),
        ({4: 5, 5: 4}, 1.0, set()),
        ({3: 5, 5: 5}, 1.0, {5}),
    ],
    ids=["a copy", "one layer", "other weights", "layers swapped", "a layer from elsewhere"],
)
def test_the_lab_s_features_are_known_in_the_lab_s_saes_alone(
    layers: dict[int, int], change: float, ours: set[int], tmp_path: Path, state: AppState
) -> None:
    folder = group_of(tmp_path, layers, change)
    found = AppState(load_scope("lab", sae=str(folder), device="cpu"))
    every = {(one["layer"], one["feature"], one["factor"]) for one in state.known}
    assert {(one["layer"], one["feature"], one["factor"]) for one in found.known} == {x for x in every if x[0] in ours}
    assert {one["layer"] for one in found.known} <= ours
    begins = found.default_intervention()
    presets = {layer for _, layer, _, _ in PRESETS.values()}
    assert (begins["feature"] is not None) == bool(presets & ours)
    assert begins["layer"] in layers


def test_the_lab_s_features_are_those_of_its_card(state: AppState) -> None:
    measured = json.loads((LABS.parent / "metrics.json").read_text())["detectors"]
    assert sorted(one["factor"] for one in state.known) == sorted(one["factor"] for one in measured)


LINES = [
    ("one\ntwo", ["one", "two"]),
    ("one\r\ntwo\r\n", ["one", "two"]),
    *((f"a{end}b\nc", [f"a{end}b", "c"]) for end in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"),
    ("\n \n a\n\t\nb ", [" a", "b "]),
    ("\r\n\r\n", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "lines"), LINES, ids=lambda value: ascii(value)[:24])
def test_a_line_ends_at_its_newline_alone(text: str, lines: list[str], state: AppState, tmp_path: Path) -> None:
    assert text_lines(text) == lines
    if len(lines) > 1:
        assert steering.sweep_prompts(state, "unused", text) == lines
    if lines:
        (tmp_path / "prompts.txt").write_bytes(text.encode())
        assert read_prompts(tmp_path / "prompts.txt") == lines


def test_texts_that_may_not_be_read(state: AppState) -> None:
    small = AppState(state.scope, limits=dataclasses.replace(state.limits, characters=10))
    for text, says in (("", "is empty"), (" \n", "is empty"), ("x" * 11, "11 characters and this page reads up to 10")):
        with pytest.raises(InputError, match=says):
            small.check_text(text)
    with pytest.raises(InputError, match="one of plain, thinking, non_thinking"):
        state.seen("Hello", LAYER, "shouting")


def test_a_side_is_a_text_or_the_rows_of_a_file(state: AppState, tmp_path: Path) -> None:
    assert state.side("one text", None, "first") == ["one text"]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert state.side("ignored", str(tmp_path / "a.txt"), "first") == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"text": "drei"}\n{"text": "vier"}\n')
    assert state.side("", str(tmp_path / "b.jsonl"), "first") == ["drei", "vier"]
    for name, content, says in (
        ("many.txt", "x\n" * 6, "more than 5 texts"),
        ("none.txt", "\n", "holds no text"),
        ("bad.jsonl", "not json\n", "row 1 of the second file can't be used"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=says):
            state.side("", str(tmp_path / name), "second")


def test_sets_compare_as_the_scope_does(state: AppState) -> None:
    found, seen = state.compare(GERMAN[:2], ENGLISH, [LAYER], 5, ["first"])
    assert found == state.scope.compare(GERMAN[:2], ENGLISH, [LAYER], n=5, drop_first=True)
    assert seen.texts == [*GERMAN[:2], *ENGLISH]
    with pytest.raises(InputError, match="first, common or prefix"):
        state.compare(GERMAN, ENGLISH, [LAYER], 5, ["last"])


def test_only_the_stores_named_at_the_start_can_be_opened(state: AppState, stores: dict[str, Path]) -> None:
    for name in (str(stores["german"]), "../german", "/etc", ""):
        with pytest.raises(InputError, match="there is no store"):
            state.store(name)


def test_labels_come_with_their_score_and_notes_stay(state: AppState, stores: dict[str, Path]) -> None:
    assert state.label(LAYER, 7) is None
    with state.store("german") as store:
        good = Interval(0.9, 0.8, 1.0, 20)
        label = Label("German words", good, Interval(0.7, 0.6, 0.8, 20), "summary", "tokens")
        Notes(store).add(make_label(LAYER, 7, store.layer(LAYER).fingerprint, label))
    named = state.label(LAYER, 7)
    assert named is not None
    assert (named.text, named.score) == ("German words", pytest.approx(0.8))

    state.write_note(LAYER, 7, "german", "fires on umlauts", "Ada")
    page = AppState(state.scope, stores).feature_page(LAYER, 7, "german")
    assert [note.body["text"] for note in page.notes if note.kind == "note"] == ["fires on umlauts"]
    with pytest.raises(InputError, match="the note is empty"):
        state.write_note(LAYER, 7, "german", " ", "Ada")


def test_features_that_do_not_exist(state: AppState) -> None:
    for layer, feature, says in ((LAYER, 2048, "features 0 to 2047"), (LAYER, -1, "no feature -1"), (9, 0, "layer 9")):
        with pytest.raises(QwenScopeError, match=says):
            state.feature_page(layer, feature)
    with pytest.raises((NotFoundError, MismatchError)):
        state.feature_page(0, 1, "german")


@pytest.mark.parametrize("value", [None, "", "four", 1.5, float("nan"), float("inf"), True])
def test_fields_that_are_no_whole_number(value: object) -> None:
    with pytest.raises(InputError, match="whole number"):
        whole_number(value, "layer")
    assert whole_number("7", "layer") == whole_number(7.0, "layer") == 7


def test_work_reports_and_stops() -> None:
    jobs = Jobs()
    with jobs.at_work("ada") as stop:
        assert jobs.running == 1
        told = list(watched(lambda report: [report("a", share, "") for share in (0.0, 0.5)] and "result", stop))
    assert [getattr(one, "share", one) for one in told] == [0.0, 0.5, "result"]
    assert jobs.running == 0

    def endless(report):
        while True:
            report("a", 0.5, "")

    with jobs.at_work("ada") as stop:
        for count, _ in enumerate(watched(endless, stop)):
            if count == 3:
                jobs.stop("bob")
                assert not stop.is_set()
                jobs.stop("ada")
        assert stop.is_set()

    def wrong(report):
        raise InputError("no")

    with jobs.at_work("ada") as stop, pytest.raises(InputError, match="no"):
        list(watched(wrong, stop))


def test_silent_work_tells_that_it_is_stopping() -> None:
    jobs, go_on = Jobs(), threading.Event()

    def silent(report):
        report("reading", 0.5, "")
        go_on.wait()
        report("comparing", 0.9, "")
        return "result"

    told = []
    with jobs.at_work("ada") as stop:
        for one in watched(silent, stop):
            assert isinstance(one, Told), "stopped work has no result"
            told.append(one.stage)
            jobs.stop("ada")
            if one.stage == "stopping":
                go_on.set()
    assert told == ["reading", "stopping"]


@pytest.mark.parametrize("stopped_at", [0, 1])
def test_an_analysis_tells_its_steps_and_stops_between_them(state: AppState, stopped_at: int) -> None:
    names = list(state.stores)
    steps = []
    found = analysed(state, names, "overlap", LAYER, lambda *told: steps.append(told))
    assert [(stage, share) for stage, share, _ in steps] == [("reading", 0), ("reading", 1 / 3), ("comparing", 2 / 3)]
    assert found.notes == analysed(state, names, "overlap", LAYER).notes

    reached = []

    def report(*told):
        reached.append(told)
        if len(reached) > stopped_at:
            raise Stopped

    with pytest.raises(Stopped):
        analysed(state, names, "overlap", LAYER, report)
    assert len(reached) == stopped_at + 1


def test_opened_stores_are_lent_to_one_at_a_time_and_few_are_kept(stores: dict[str, Path], tmp_path: Path) -> None:
    store_pool, folder = StorePool(), tmp_path / "own"
    shutil.copytree(stores["german"], folder)
    with store_pool.lent(folder) as first, store_pool.lent(folder) as second:
        assert first is not second
    with store_pool.lent(folder) as again:
        assert again in (first, second)
    (folder / "manifest.json").touch()
    with store_pool.lent(folder) as anew:
        assert anew not in (first, second)
    for other in (*stores.values(), folder):
        with store_pool.lent(other):
            pass
    assert len(store_pool) == 2
    with pytest.raises(InputError, match="no"), store_pool.lent(folder) as failed:
        raise InputError("no")
    with store_pool.lent(folder) as last:
        assert last is not failed


def test_what_fires_with_a_feature_can_follow_its_page(state: AppState) -> None:
    feature = state.scope.features(GERMAN, [LAYER]).strongest(0, LAYER, 1)[0].feature
    whole = state.feature_page(LAYER, feature, "german")
    quick = state.feature_page(LAYER, feature, "german", with_cofiring=False)
    assert whole.cofiring
    assert quick.cofiring == ()
    assert state.with_cofiring(quick, "german").to_json() == whole.to_json()


def test_silent_tokens_of_a_context_are_one_piece() -> None:
    made = passage(["a", " b\n", "<i>", "d", "", "e"], [0, 0, 2.0, 1.0, 0, 0], 2.0)
    assert made[0] == '<bdi class="qs-silent">a b⏎<br></bdi>'
    assert [one.startswith("<span") and "--v:" in one for one in made] == [False, True, True, False]
    assert "<i>" not in "".join(made)
    assert made[3] == '<bdi class="qs-silent">e</bdi>'


def test_a_link_carries_a_reading_unless_it_is_long() -> None:
    text = "Hallo & <b>?=#%\n🙂"
    asked = parse_qs(urlsplit(address(Reading(text, "thinking", 3))).query)
    assert asked == {"tab": ["explore"], "layer": ["3"], "chat": ["thinking"], "text": [text]}
    assert address(Reading("x" * 5000, "plain", 3)) == "?tab=explore"
