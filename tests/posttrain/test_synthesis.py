"""Synthesis against the lab's writer on loopback: what is kept, what failures cost, how a stopped run goes on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthesis_lab as lab
import tiny
from datasets import Dataset
from synthesis_lab import LAYER, SMALL

from qwen_scope import FeatureStore
from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError, QwenScopeWarning
from qwen_scope.features import Endpoint, Label, Notes, make_label
from qwen_scope.files import lock_folder
from qwen_scope.model import LoadedModel
from qwen_scope.posttrain import (
    SynthesisOptions,
    judged_targets,
    listed_targets,
    price,
    searched_targets,
    serving_lab,
    synthesize,
)
from qwen_scope.posttrain.journal import Attempt, Journal
from qwen_scope.posttrain.writer import copied
from qwen_scope.scope import extract
from qwen_scope.stats import Interval


def run(server: Any, out: Path, options: SynthesisOptions = SMALL, **more: Any) -> dict[str, Any]:
    endpoint = Endpoint(server.url, "lab", timeout=more.pop("timeout", 30), tries=8, wait=0.01, concurrency=3)
    targets = more.pop("targets", lab.targets())
    return synthesize(lab.scope(), lab.corpus(), targets, endpoint, out, options, **more)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(out: Path) -> list[Any]:
    """Everything a run made; activations to three digits, as another process may add in another order."""
    found = [rows(out / "data.jsonl"), Dataset.from_parquet(str(out / "data.parquet")).to_list()]
    for row in (*found[0], *found[1]):
        row["activation"] = round(row["activation"], 3)
    return [*found, rows(out / "targets.jsonl"), json.loads((out / "metrics.json").read_text())]


def bounds(values: np.ndarray) -> list[tuple[int, int]]:
    """Per target in how many texts it fires, at least and at most, for values known to a thousandth."""
    return [
        tuple(int((values[:, t.feature] > t.threshold + slack).sum()) for slack in (1e-3, -1e-3)) for t in lab.targets()
    ]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("synthesis") / "clean"
    with lab.failing() as server:
        run(server, out)
    return out


def test_what_is_kept_fires_and_says_where_it_comes_from(clean: Path) -> None:
    kept, metrics = rows(clean / "data.jsonl"), json.loads((clean / "metrics.json").read_text())
    by_feature = {target.feature: target for target in lab.targets()}
    assert kept
    values = lab.strongest([row["text"] for row in kept])
    for row, value in zip(kept, values, strict=True):
        target = by_feature[row["feature"]]
        assert value[row["feature"]] == pytest.approx(row["activation"], abs=1e-3)
        assert row["activation"] > row["threshold"] == target.threshold
        assert (row["layer"], row["sae"], row["label"], row["model"]) == (LAYER, target.sae, target.label, "lab")
        assert row["label_source"] == "summary"
        assert row["asked"].endswith(f"Text number {row['attempt']}:")
        assert target.label in row["asked"]
    assert len({" ".join(row["text"].casefold().split()) for row in kept}) == len(kept)
    before = lab.strongest(lab.texts(2, 12))
    fires = bounds(np.concatenate([before, values]))
    for row, (low, high) in zip(rows(clean / "targets.jsonl"), fires, strict=True):
        assert low <= row["documents"] <= high
    assert metrics["coverage"] == np.mean([row["documents"] > 0 for row in rows(clean / "targets.jsonl")])
    assert metrics["coverage_before"] == 0
    assert Dataset.from_parquet(str(clean / "data.parquet")).to_list() == kept
    outcomes = metrics["outcomes"]
    assert sum(outcomes.values()) == metrics["answers"] == sum(row["answers"] for row in rows(clean / "targets.jsonl"))
    assert set(json.loads((clean / "run.json").read_text())) >= {"request", "versions", "budget"}


def test_what_is_taken_from_the_question_is_a_copy() -> None:
    excerpt = "The weather was<< fine>> 10 in the morning, ⏎ and nobody  was at home when the postman rang twice."
    question = [{"role": "system", "content": "Write."}, {"role": "user", "content": f"Excerpts:\n1. {excerpt}"}]
    bare = excerpt.replace("<<", "").replace(">> 10", "").replace("⏎ ", "")
    for text in (excerpt, bare, bare.upper(), bare[10:50], f"{bare}!", "Write."):
        assert copied(text, question), text
    for text in (
        bare.replace("nobody", "everybody"),
        f"{bare} Then it began to snow.",
        "Nobody was there.",
        bare[::-1],
    ):
        assert not copied(text, question), text


@pytest.mark.slow
def test_failures_of_the_server_change_nothing(clean: Path, tmp_path: Path) -> None:
    ways = ("timeout", "429", "500", "cut-off JSON", "cut-off connection", "500", "429", "cut-off JSON")
    with lab.failing(*ways) as server:
        found = run(server, tmp_path / "out", timeout=8)
        assert not server.left
    assert content(tmp_path / "out") == content(clean)
    assert found["spent"]["requests"] >= found["answers"] + len(ways)


def test_useless_answers_are_recorded_and_end_nothing(tmp_path: Path) -> None:
    ways = ("empty", "no text", "wrong language", "refused", "half a surrogate", "wrong language", "copied")
    with lab.failing(*ways) as server:
        found = run(server, tmp_path / "out")
    attempts = [row for path in sorted((tmp_path / "out" / "rounds").iterdir()) for row in rows(path)]
    outcomes = found["outcomes"]
    assert outcomes["empty"] == 2
    assert outcomes["failed"] == 2
    assert any("content policy" in row["problem"] for row in attempts)
    assert [row["outcome"] for row in attempts if "<<" in row["text"]] == ["copied"]
    assert sum("Completely different" in row["text"] and row["outcome"] != "kept" for row in attempts) >= 1
    assert outcomes["kept"] == len(rows(tmp_path / "out" / "data.jsonl")) > 0
    assert found["coverage"] > 0


def test_a_stopped_run_goes_on_to_the_same_result(clean: Path, tmp_path: Path) -> None:
    def stop(stage: str, share: float, text: str) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with lab.failing() as server:
        with pytest.raises(KeyboardInterrupt):
            run(server, out, progress=stop)
        (out / "rounds" / "000002.jsonl.part").write_text('{"half')
        run(server, out)
        assert set(server.seen.values()) == {1}
        assert content(out) == content(clean)
        # A smaller budget first, in the middle of a round: no answer is paid twice either.
        for budget in (3, 11, SMALL.budget):
            run(server, tmp_path / "grown", replace(SMALL, budget=budget))
        assert set(server.seen.values()) == {2}
    assert content(tmp_path / "grown") == content(clean)
    with lab.failing() as server, pytest.raises(InputError, match="another tries"):
        run(server, out, replace(SMALL, tries=5))


def test_the_command_is_interrupted_at_a_slow_server_and_goes_on(tmp_path: Path, capsys, monkeypatch) -> None:
    features = ",".join(str(t.feature) for t in lab.targets()[:3])
    words = ["synthesize", "lab", "--sample", "4", "--store", str(lab.folder()), "--strength", "0.9", "--device", "cpu"]
    words += ["-f", features, "--budget", "6", "--json", "-o"]
    monkeypatch.setenv("OPENAI_MODEL", "lab")
    struck = []

    def strike() -> None:
        struck.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    with lab.failing(*["timeout"] * 3) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        server.after[1] = strike
        assert main([*words, str(tmp_path / "out")]) == 130
        assert time.monotonic() - struck[0] < 20  # the server takes 60 s
        server.over.set()
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1] == "qwen-scope: interrupted"
        assert "Traceback" not in err
        assert not (tmp_path / "out" / "data.jsonl").exists()
        assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name]
        for name in ("out", "clean"):
            assert main([*words, str(tmp_path / name)]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "clean")


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_result(clean: Path, tmp_path: Path) -> None:
    script = (
        "import sys, synthesis_lab as lab, test_synthesis as t; from pathlib import Path;"
        "t.run(type('S', (), {'url': sys.argv[1]}), Path(sys.argv[2]))"
    )
    here = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (here.parents[1] / "src", here, here.parent)))}
    with lab.failing() as server:
        child = subprocess.Popen(
            [sys.executable, "-c", script, server.url, str(tmp_path / "out")], env={**os.environ, **paths}
        )
        # The server itself strikes, in the middle of the second round.
        server.after[11] = lambda: child.send_signal(signal.SIGKILL)
        assert child.wait(300) == -signal.SIGKILL
        assert not (tmp_path / "out" / "data.jsonl").exists()
        run(server, tmp_path / "out")
    assert content(tmp_path / "out") == content(clean)


def test_a_full_disk_is_said_and_loses_nothing(clean: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(stage: str, share: float, text: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))

    with lab.failing() as server:
        try:
            with pytest.raises(InputError, match="no room to write") as caught:
                run(server, tmp_path / "out", progress=fill)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "run the same command again" in str(caught.value)
        run(server, tmp_path / "out")
    assert content(tmp_path / "out") == content(clean)


def test_a_server_that_is_gone_ends_the_run_with_what_there_is(clean: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with lab.failing() as server:
        server.after[9] = lambda: setattr(server, "gone", True)
        with pytest.raises(NotFoundError, match="the same command goes on"):
            run(server, out)
        assert len(list((out / "rounds").iterdir())) == 2
        server.gone = False
        run(server, out)
    assert content(out) == content(clean)
    with pytest.raises(NotFoundError, match="no answer"):
        synthesize(
            lab.scope(),
            lab.corpus(),
            lab.targets(),
            Endpoint(server.url, "lab", tries=1, timeout=5),
            tmp_path / "other",
            SMALL,
        )


def test_what_belongs_to_another_sae_is_refused(tmp_path: Path) -> None:
    other = replace(lab.targets()[0], sae="0" * 64)
    with lab.failing() as server:
        with pytest.raises(MismatchError, match="another SAE"):
            run(server, tmp_path / "a", targets=[other])
        with pytest.raises(NotFoundError, match="layer"):
            run(server, tmp_path / "a", targets=[replace(lab.targets()[0], layer=77)])
        with pytest.raises(InputError, match="name each once"):
            run(server, tmp_path / "a", targets=[])
        loaded = LoadedModel(lab.scope().model, lab.scope().tokenizer, "lab")
        sae = tiny.random_sae(LAYER, d_model=lab.scope().d_model)
        with extract(lab.corpus(n=3), loaded, {LAYER: sae}, tmp_path / "foreign") as store:
            endpoint = Endpoint(server.url, "lab")
            with pytest.raises(MismatchError, match="was made with the SAE"):
                synthesize(lab.scope(), store, lab.targets(), endpoint, tmp_path / "a", SMALL)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "letter.txt").write_text("mine")
        with pytest.raises(InputError, match="something other"):
            run(server, tmp_path / "full")
        assert not server.seen
    assert not (tmp_path / "a" / "run.json").exists()
    for wrong in ({"budget": 0}, {"want": 0}, {"temperature": 3.0}):
        with pytest.raises(InputError):
            SynthesisOptions(**wrong)


def test_a_damaged_journal_is_named(clean: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(clean, tmp_path / "out"))
    (out / "rounds" / "000001.jsonl").write_text('{"layer": 5}\n')
    with lab.failing() as server, pytest.raises(FormatError, match=r"line 1 of .*000001"):
        run(server, out)


@pytest.mark.parametrize(
    "change",
    [
        {"layer": True}, {"feature": 1.5}, {"attempt": 0}, {"outcome": "lost"}, {"text": None}, {"activation": "high"},
        {"fires": [[1, 2]]}, {"fires": [[True, 2, 0.5]]}, {"more": 1},
    ],
)  # fmt: skip
def test_an_attempt_with_a_value_that_can_not_be_is_named(tmp_path: Path, change: dict) -> None:
    one = asdict(Attempt(5, 3, 1, "kept", "text", 0.5, ((5, 3, 0.5),)))
    (tmp_path / "000001.jsonl").write_text(json.dumps(one) + "\n")
    assert Journal(tmp_path).rounds == [[Attempt(5, 3, 1, "kept", "text", 0.5, ((5, 3, 0.5),))]]
    (tmp_path / "000001.jsonl").write_text(json.dumps(one | change) + "\n")
    with pytest.raises(FormatError, match=r"line 1 of .*000001.*delete this file"):
        Journal(tmp_path)


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c", "\r"])
def test_an_answer_may_hold_whatever_other_readers_take_for_the_end_of_a_line(tmp_path: Path, sign: str) -> None:
    journal = Journal(tmp_path)
    rounds = [[Attempt(5, 3, 1, "kept", f"one{sign}two", 0.5)], [Attempt(5, 3, 2, "silent", sign)]]
    for number, attempts in enumerate(rounds):
        journal.seal(number, attempts)
    assert Journal(tmp_path).rounds == rounds


def test_a_torn_round_is_asked_again(clean: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(clean, tmp_path / "out"))
    path = out / "rounds" / "000001.jsonl"
    before = path.read_bytes()
    path.write_bytes(before[:-20])
    with lab.failing() as server, pytest.warns(QwenScopeWarning, match="torn"):
        run(server, out)
    assert path.read_bytes() == before
    assert (out / "data.jsonl").read_bytes() == (clean / "data.jsonl").read_bytes()


def test_a_second_writer_is_refused(clean: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(clean, tmp_path / "out"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with lab.failing() as server, lock_folder(out), pytest.raises(InputError, match="is writing to"):
        run(server, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_pairs_differ_in_the_feature_and_weak_targets_are_filled(tmp_path: Path) -> None:
    options = replace(SMALL, budget=60, pairs=True, instruction="Say something.")
    with lab.failing(error_rate=0.0) as server:
        found = run(server, tmp_path / "out", options)
    pairs = rows(tmp_path / "out" / "pairs.jsonl")
    assert len(pairs) == found["pairs"]["pairs"] > 0
    kept = {row["text"] for row in rows(tmp_path / "out" / "data.jsonl")}
    chosen, rejected = (lab.strongest([row[name] for row in pairs]) for name in ("chosen", "rejected"))
    for row, a, b in zip(pairs, chosen, rejected, strict=True):
        assert row["prompt"] == "Say something."
        assert row["chosen"] in kept
        assert a[row["feature"]] > row["threshold"] >= b[row["feature"]] - 1e-3
    assert list(Dataset.from_parquet(str(tmp_path / "out" / "pairs.parquet")).features)[:3] == [
        "prompt",
        "chosen",
        "rejected",
    ]
    assert found["answers"] + found["pairs"]["answers"] <= 60
    assert found["answers"] > len(lab.targets())


def test_controls_get_as_many_texts(tmp_path: Path) -> None:
    with lab.failing() as server:
        found = run(server, tmp_path / "out", natural=lab.corpus(3, 40))
    curves = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert set(curves) == {"targeted", "untargeted", "natural"}
    assert {curve[-1][0] for curve in curves.values()} == {found["answers"]}
    now = lab.strongest(lab.texts(3, 40)[: found["answers"]])
    low, high = (sum(n > 0 for n in side) for side in zip(*bounds(now), strict=True))
    assert low <= curves["natural"][-1][1] <= high
    for curve in curves.values():
        assert [n for n, _ in curve] == sorted({n for n, _ in curve})
        assert [covered for _, covered in curve] == sorted(covered for _, covered in curve)


def test_targets_are_listed_searched_and_judged(tmp_path: Path) -> None:
    with FeatureStore(shutil.copytree(lab.folder(), tmp_path / "store")) as store, lab.failing() as server:
        endpoint, good = Endpoint(server.url, "lab"), Interval(0.9, 0.8, 1.0, 10)
        with pytest.raises(NotFoundError, match="qwen-scope label"):
            judged_targets(store, "rude speech", endpoint)
        some = [t.feature for t in lab.targets()[:3]]
        for feature, name in zip(some, ("rude German talk", "polite speech", "sums"), strict=True):
            label = Label(name, good, good, "m", "m")
            Notes(store).add(make_label(LAYER, feature, store.layer(LAYER).fingerprint, label))
        judged = judged_targets(store, "rude speech", endpoint, 0.5)
        assert [(t.feature, t.label, t.relevance) for t in judged] == sorted(
            [(some[0], "rude German talk", 0.5), (some[1], "polite speech", 0.5)]
        )
        with pytest.raises(NotFoundError, match=r"highest relevance is 0\.5"):
            judged_targets(store, "rude speech", endpoint, 0.9)
        assert [t.feature for t in searched_targets(store, "german")] == [some[0]]
        with pytest.raises(NotFoundError, match="no label"):
            searched_targets(store, "nothing")
        with pytest.raises(InputError, match="strength"):
            listed_targets(store, [(LAYER, some[0])], 1.0)
    loaded = LoadedModel(lab.scope().model, lab.scope().tokenizer, "lab")
    with extract(lab.corpus(n=1), loaded, {LAYER: lab.scope().saes[LAYER]}, tmp_path / "one") as store:
        silent = int(np.argmin(store.stats(LAYER)["tokens"].to_numpy()))
        with pytest.raises(InputError, match="nothing says what to"):
            listed_targets(store, [(LAYER, silent)])


def test_a_price_is_arithmetic_and_asks_nothing(tmp_path: Path) -> None:
    found, counts = price(lab.scope(), lab.corpus(), lab.targets(), tmp_path / "out", SMALL, per_million=(2.0, 8.0))
    assert counts == {"targets": 10, "missing": 10, "open": 10}
    assert found.requests == (20, 30)
    assert found.cost is not None
    for which in (0, 1):
        asked, given = found.prompt_tokens[which], found.answer_tokens[which]
        assert found.cost[which] == pytest.approx((2 * asked + 8 * given) / 1e6)
    assert found.answer_tokens[1] == 30 * SMALL.max_answer_tokens
    assert found.prompt_tokens[1] == pytest.approx(1.5 * found.prompt_tokens[0], abs=4)
    with serving_lab() as server:
        run(server, tmp_path / "out")


def test_the_command_writes_prices_and_refuses(tmp_path: Path, capsys, monkeypatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    features = ",".join(str(t.feature) for t in lab.targets()[:3])
    base = ["synthesize", "lab", "--sample", "4", "--store", str(lab.folder()), "--strength", "0.9", "--device", "cpu"]
    made = [*base, "-o", str(tmp_path / "out"), "-f", features, "--budget", "6"]
    assert main([*made, "--writer", "lab", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["targets"] == 3
    assert found["answers"] <= 6
    assert (
        main([*base, "-o", str(tmp_path / "p"), "-f", features, "--dry-run", "--price-in", "1", "--price-out", "4"])
        == 0
    )
    assert "cost" in capsys.readouterr().out
    wrong = (
        (made, "no language model to ask"),
        ([*base, "-o", str(tmp_path / "w"), "--writer", "lab"], "say which targets"),
        ([*made, "--writer", "lab", "--price-in", "1"], "needs both"),
        ([*base, "-o", str(tmp_path / "w"), "-f", "99999", "--writer", "lab"], "0 to 2047"),
        ([*base, "-o", str(tmp_path / "w"), "--concept", "rude", "--writer", "lab"], "qwen-scope label"),
        ([*made, "--writer", "lab", "--tries", "2"], "another tries"),
    )
    for words, said in wrong:
        assert main(words) == 2, said
        error = capsys.readouterr().err
        assert said in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "w").exists()
