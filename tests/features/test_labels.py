"""Labels, their scores, the endpoint and the notes: a canned judge, and a real HTTP server on the loopback."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lab_store
import numpy as np
import pytest
from lab_store import LAYER

from qwen_scope import FeatureStore
from qwen_scope.cli import main
from qwen_scope.cli.label import print_labelled
from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError
from qwen_scope.features import (
    BudgetSpent,
    Endpoint,
    Label,
    LabelOptions,
    ModelJudge,
    Note,
    Notes,
    TokenJudge,
    excerpt,
    label_features,
    label_text,
    make_label,
    material,
    scored_label,
)
from qwen_scope.stats import Interval

SMALL = LabelOptions(examples=6, tests=6)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    with FeatureStore(lab_store.copied(tmp_path)) as opened:
        yield opened


def busy(store: FeatureStore, n: int = 1) -> list[int]:
    """Features that fire in about half of the documents."""
    documents = store.stats(LAYER)["documents"].to_numpy()
    return np.argsort(np.abs(documents - store.manifest.documents // 2), kind="stable")[:n].tolist()


class Canned:
    """Knows the truth, or always says the same."""

    source = scorer = "canned"
    concurrency = 2

    def __init__(self, says: bool | None = None, knows: bool = True) -> None:
        self.says, self.knows = says, knows

    def explain(self, examples) -> str:
        return "a name"

    def detect(self, label, texts) -> list[bool | None]:
        return [context.value > 0 if self.knows else self.says for context in texts]

    def fuzz(self, label, marked) -> list[bool | None]:
        return [any(c.values[i] > 0 for i in places) if self.knows else self.says for c, places in marked]


def test_a_judge_that_knows_scores_one_and_one_that_does_not_scores_half(store: FeatureStore) -> None:
    given = material(store, LAYER, busy(store)[0], SMALL)
    assert (scored_label(given, Canned()).detection.estimate, scored_label(given, Canned()).fuzzing.estimate) == (1, 1)
    for says in (True, False):
        label = scored_label(given, Canned(says, knows=False))
        assert (label.detection.estimate, label.fuzzing.estimate) == (0.5, 0.5)
        assert label.detection.low <= 0.5 <= label.detection.high
    with pytest.raises(InputError, match="answered 0 and 0"):
        scored_label(given, Canned(None, knows=False))


def test_names_are_tested_on_documents_they_were_not_made_from(store: FeatureStore) -> None:
    feature = busy(store)[0]
    given = material(store, LAYER, feature, SMALL)
    made = {context.document for context in given.examples}
    assert made.isdisjoint({context.document for context in given.firing})
    assert all(max(context.values) > 0 for context in given.firing)
    rows = store.sql("SELECT document, position FROM features WHERE layer = ? AND feature = ?", [LAYER, feature])
    fires = set(zip(rows["document"].to_pylist(), rows["position"].to_pylist(), strict=True))
    assert given.silent
    for context, marked in zip(given.silent, given.marked, strict=True):
        shown = {(context.document, context.start + i) for i in range(len(context.tokens))}
        assert not shown & fires
        assert marked <= set(range(len(context.tokens)))
    rare = int(np.argmin(store.stats(LAYER)["documents"].to_numpy()))
    with pytest.raises(InputError, match="contexts left"):
        material(store, LAYER, rare, SMALL)


def test_without_a_model_the_name_is_a_list_of_tokens_that_says_so(store: FeatureStore) -> None:
    feature = busy(store)[0]
    found = label_features(store, [(LAYER, feature)], TokenJudge(), SMALL)[LAYER, feature]
    assert isinstance(found, Label)
    assert found.text.startswith("typical tokens: ")
    assert (found.source, found.by_model) == ("summary", False)
    page = Notes(store).label(LAYER, feature)
    assert page == found


class Server(ThreadingHTTPServer):
    """Answers chat completions; `plan` lists status codes to give first."""

    def __init__(self, plan: list[int] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.seen, self.lock = list(plan or []), [], threading.Lock()
        self.content = lambda body: None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.headers.get("Authorization"), body))
            status = self.server.plan.pop(0) if self.server.plan else 200
        content = self.server.content(body)
        if content is None:
            system, user = (message["content"] for message in body["messages"])
            numbered = re.findall(r"^\d+\. (.*)$", user, re.MULTILINE)
            # Detection: yes to texts with a full stop; fuzzing: yes where something is marked that is no full stop.
            content = "NAME: full stops" if "NAME:" in system else str([int("." in text) for text in numbered])
        reply = {"choices": [{"message": {"content": content}}], "usage": {"total_tokens": 10}}
        data = json.dumps(reply if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(plan: list[int] | None = None) -> Iterator[tuple[Server, str]]:
    server = Server(plan)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


MESSAGES = [{"role": "system", "content": "NAME:"}, {"role": "user", "content": "x"}]


def test_an_endpoint_is_asked_with_the_key_and_never_twice_the_same(tmp_path: Path) -> None:
    with serving() as (server, url):
        endpoint = Endpoint(url, "m", "secret", cache=tmp_path / "cache")
        assert endpoint.ask(MESSAGES, temperature=0) == endpoint.ask(MESSAGES, temperature=0) == "NAME: full stops"
        path, key, body = server.seen[0]
        assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
        assert (len(server.seen), endpoint.spent.cached, endpoint.spent.tokens) == (1, 1, 10)
        endpoint.ask(MESSAGES, temperature=1)
        assert len(server.seen) == 2
    assert "secret" not in repr(endpoint)
    assert not [p for p in (tmp_path / "cache").iterdir() if "secret" in p.read_text()]
    for kept in (tmp_path / "cache").iterdir():
        kept.write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        endpoint.ask(MESSAGES, temperature=0)


def test_an_endpoint_tries_again_and_then_says_why() -> None:
    with serving([429, 503]) as (server, url):
        assert Endpoint(url, "m", wait=0.001).ask(MESSAGES) == "NAME: full stops"
        assert len(server.seen) == 3
        server.plan = [500] * 3
        with pytest.raises(NotFoundError, match="no answer in 3 tries"):
            Endpoint(url, "m", tries=3, wait=0.001).ask(MESSAGES)
        server.plan = [401]
        with pytest.raises(InputError, match="401"):
            Endpoint(url, "m").ask(MESSAGES)
        server.content = lambda body: 7
        with pytest.raises(FormatError, match="no chat completion"):
            Endpoint(url, "m").ask(MESSAGES)
    with pytest.raises(NotFoundError, match="gave no answer"):
        Endpoint(url, "m", tries=1, timeout=2).ask(MESSAGES)
    with pytest.raises(InputError, match="http"):
        Endpoint("ftp://x", "m")


def test_a_budget_ends_the_questions(tmp_path: Path) -> None:
    many = [[*MESSAGES[:1], {"role": "user", "content": str(i)}] for i in range(6)]
    with serving() as (server, url):
        endpoint = Endpoint(url, "m", max_requests=4, cache=tmp_path, concurrency=2)
        answers = endpoint.ask_many(many)
        assert sum(answer is not None for answer in answers) == len(server.seen) == 4
        with pytest.raises(BudgetSpent, match="4 requests"):
            endpoint.ask([*MESSAGES[:1], {"role": "user", "content": "other"}])
        # Another run takes up what is in the cache and asks the rest.
        assert None not in Endpoint(url, "m", max_requests=2, cache=tmp_path).ask_many(many)
        spent = Endpoint(url, "m", max_tokens=10)
        spent.ask(MESSAGES)
        with pytest.raises(BudgetSpent, match="tokens"):
            spent.ask(MESSAGES)


@pytest.mark.slow
def test_labels_through_a_server_are_scored_kept_and_not_made_twice(store: FeatureStore, tmp_path: Path) -> None:
    places = [(LAYER, feature) for feature in busy(store, 3)]
    with serving() as (server, url):
        judge = ModelJudge(Endpoint(url, "judge-1", cache=tmp_path / "cache", concurrency=3))
        found = label_features(store, places, judge, SMALL)
        asked = len(server.seen)
        assert list(found) == places
        for place, label in found.items():
            assert isinstance(label, Label)
            assert (label.text, label.source) == ("full stops", "judge-1")
            given = material(store, *place, SMALL)
            yes = [np.mean(["." in c.text for c in some]) for some in (given.firing, given.silent)]
            assert label.detection.estimate == pytest.approx((yes[0] + 1 - yes[1]) / 2)
        assert label_features(store, places, judge, SMALL) == found
        assert len(server.seen) == asked
        out_of = ModelJudge(Endpoint(url, "judge-2", max_requests=3))
        assert label_features(store, places, out_of, SMALL) == {}
        server.content = lambda body: "I would rather not"
        with pytest.raises(FormatError, match="NAME:"):
            label_features(store, places, ModelJudge(Endpoint(url, "judge-3")), SMALL)
    shown = Notes(store).label(*places[0])
    assert shown is not None
    assert shown.by_model


BAD_NAMES = {
    "no name": "I would rather not",
    "an object": {"text": "NAME: cats"},
    "parts without text": [{"type": "image"}],
    "an empty name": 'NAME: **""**',
    "thoughts alone": "<think>NAME: perhaps cats",
}


@pytest.mark.parametrize("way", BAD_NAMES)
def test_one_bad_answer_costs_one_feature_its_name_and_is_not_kept(
    way: str, store: FeatureStore, tmp_path: Path
) -> None:
    places = [(LAYER, feature) for feature in busy(store, 3)]
    examples = material(store, *places[1], SMALL).examples
    shown = excerpt(examples[0], scale=max(context.value for context in examples))
    with serving() as (server, url):
        server.content = lambda body: BAD_NAMES[way] if shown in body["messages"][1]["content"] else None
        judge = ModelJudge(Endpoint(url, "judge-1", cache=tmp_path / "cache", concurrency=2))
        found = label_features(store, places, judge, SMALL)
        assert [isinstance(found[place], Label) for place in places] == [True, False, True]
        assert judge.endpoint.spent.unusable == 2
        server.content = lambda body: None
        assert isinstance(label_features(store, places, judge, SMALL)[places[1]], Label)


def test_an_answer_of_no_use_that_an_older_version_kept_is_asked_for_again(tmp_path: Path) -> None:
    with serving() as (server, url):
        endpoint = Endpoint(url, "m", cache=tmp_path)
        server.content = lambda body: "I would rather not"
        endpoint.ask(MESSAGES)
        server.content = lambda body: None
        assert endpoint.ask(MESSAGES, lambda text: "NAME:" in text) == "NAME: full stops"
        assert endpoint.ask(MESSAGES) == "NAME: full stops"
        assert len(server.seen) == 2


def test_a_key_that_is_refused_ends_the_run(store: FeatureStore) -> None:
    with serving([401] * 99) as (server, url):
        judge = ModelJudge(Endpoint(url, "judge-1", concurrency=1))
        with pytest.raises(InputError, match="401"):
            label_features(store, [(LAYER, feature) for feature in busy(store, 3)], judge, SMALL)
        assert len(server.seen) <= 2


def test_answers_of_no_use_to_single_questions_only_lower_their_number(store: FeatureStore) -> None:
    with serving() as (server, url):
        server.content = lambda body: "who knows" if "marked with <<" in body["messages"][0]["content"] else None
        found = label_features(store, [(LAYER, busy(store)[0])], ModelJudge(Endpoint(url, "judge-1")), SMALL)
    assert list(found.values()) == ["the judge answered 0 and 0 questions of each kind; 2 are the least"]


def test_notes_are_exported_and_merged_without_loss(store: FeatureStore, tmp_path: Path) -> None:
    feature = busy(store)[0]
    notes = Notes(store)
    label_features(store, [(LAYER, feature)], Canned(), SMALL)
    notes = Notes(store)
    notes.write(LAYER, feature, "speaks <b>German</b>\u202e, perhaps", "Ann")
    notes.verdict(LAYER, feature, {"outcome": "causal", "reasons": ["yes: it moves"]})
    assert notes.export(tmp_path / "out.jsonl") == 3
    with pytest.raises(InputError, match="can't write"):
        notes.export(tmp_path / "out.jsonl")
    other = FeatureStore(lab_store.copied(tmp_path / "other"))
    theirs = Notes(other)
    theirs.write(LAYER, feature + 1, "mine")
    assert theirs.merge(tmp_path / "out.jsonl") == 3
    assert theirs.merge(tmp_path / "out.jsonl") == 0
    assert [n.id for n in Notes(other).of(LAYER, feature)] == [n.id for n in notes.of(LAYER, feature)]
    assert len(Notes(other)) == 4
    assert [n.body["text"] for n in Notes(other).search("perhaps germ")] == ["speaks <b>German</b>\u202e, perhaps"]
    assert Notes(other).search("nothing of the sort") == []


def test_notes_that_are_not_true_to_the_format_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    feature = busy(store)[0]
    fingerprint = store.layer(LAYER).fingerprint
    interval = Interval(0.5, 0.4, 0.6, 6)
    bare = Note("label", LAYER, feature, fingerprint, {"text": "x", "source": "m", "scorer": "m"})
    scored = {"text": "x", "source": "m", "scorer": "m", "detection": vars(interval), "fuzzing": vars(interval)}
    good = Note("label", LAYER, feature, fingerprint, scored).to_json()
    bad = [
        (bare.to_json(), "detection"),
        ({**good, "feature": -1}, "of at least 0; got -1"),
        ({**good, "author": "someone else"}, "has been changed"),
        ({**good, "extra": 1}, "no key 'extra'"),
        ({**good, "body": {**scored, "fuzzing": 0.9}}, "fuzzing of a label is an object"),
        ({**good, "body": {**scored, "fuzzing": {**vars(interval), "low": float("nan")}}}, "finite number.*got nan"),
        ([], "an object with keys"),
    ]
    for entry, said in bad:
        path = tmp_path / "bad.jsonl"
        path.write_text(json.dumps(good) + "\n" + json.dumps(entry) + "\n")
        with pytest.raises(FormatError, match=f"line 2.*{said}"):
            Notes(store).merge(path)
    assert len(Notes(store)) == 0
    (tmp_path / "cut.jsonl").write_text(json.dumps(good)[:-9])
    with pytest.raises(FormatError, match="line 1"):
        Notes(store).merge(tmp_path / "cut.jsonl")
    with pytest.raises(NotFoundError):
        Notes(store).merge(tmp_path / "absent.jsonl")
    with pytest.raises(MismatchError, match="another SAE"):
        Notes(store).add(Note("note", LAYER, feature, "0" * 64, {"text": "x"}))
    with pytest.raises(NotFoundError):
        Notes(store).write(LAYER, 10**6, "x")
    with pytest.raises(InputError, match="empty"):
        Notes(store).write(LAYER, feature, " ")


@pytest.mark.slow
def test_the_command_labels_notes_and_moves_them(store: FeatureStore, tmp_path: Path, capsys, monkeypatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    folder, feature = str(store.folder), f"{LAYER}/{busy(store)[0]}"
    base = ["label", folder, "--layer", str(LAYER)]
    small = ["--examples", "6", "--tests", "6"]
    assert main([*base, "-f", feature, *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"][0]["label"]["source"] == "summary"
    with serving() as (_, url):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert main([*base, "-f", feature]) == 2
        assert "OPENAI_MODEL" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_MODEL", "judge-1")
        assert main([*base, "-f", feature, *small]) == 0
        assert "full stops" in capsys.readouterr().out
        assert main([*base, "-n", "3", *small, "--max-requests", "1", "--cache", str(tmp_path / "c"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["left_for_want_of_budget"] >= 1
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert main([*base, "-f", feature, "--note", "a note", "--author", "Ann"]) == 0
    (tmp_path / "v.json").write_text(json.dumps({"outcome": "entangled", "reasons": ["no: it does not"]}))
    assert main([*base, "-f", feature, "--verdict", str(tmp_path / "v.json")]) == 0
    assert main(["label", folder, "--export", str(tmp_path / "notes.jsonl")]) == 0
    assert main(["label", folder, "--merge", str(tmp_path / "notes.jsonl")]) == 0
    assert main(["find", folder, "--label", "full stop"]) == 0
    capsys.readouterr()
    assert main(["show", folder, "-f", feature, "--no-model", "-n", "3"]) == 0
    shown = capsys.readouterr().out
    for part in ("full stops", "detection", "entangled", "a note"):
        assert part in shown
    for words, said in (
        ([], "which features"),
        (["-f", "5/1,5/2", "--note", "x"], "one feature"),
        (["-f", "5/99999"], "0 to"),
    ):
        assert main([*base, *words]) == 2
        assert said in capsys.readouterr().err


def label_of(low: float, text: str = '".", ","', source: str = "summary", high: float = 0.61) -> Label:
    detection = Interval((low + high) / 2, low, high, 20)
    return Label(text, detection, Interval(0.9, 0.8, 0.95, 20), source, "tokens")


@pytest.mark.parametrize(
    ("low", "high", "chance"),
    [(0.35, 0.61, True), (0.5, 0.9, True), (0.501, 0.9, False), (0.1, 0.3, True), (0.9, 1.0, False), (0.0, 1.0, True)],
)
def test_a_name_at_chance_says_so_wherever_it_is_shown(low: float, high: float, chance: bool) -> None:
    label = label_of(low, high=high)
    assert label.at_chance is chance
    assert label.shown == ("[at chance] " if chance else "") + '".", ","'
    assert ("[at chance]" in label_text(label)) is chance


@pytest.mark.slow
def test_a_name_at_chance_is_shown_as_such_everywhere(store: FeatureStore, tmp_path: Path, capsys, monkeypatch) -> None:
    """In the terminal, as JSON, as HTML, in a search, in the table of statistics; the notes keep the score."""
    feature = busy(store)[0]
    fingerprint = store.layer(LAYER).fingerprint
    Notes(store).add(make_label(LAYER, feature, fingerprint, label_of(0.35)))
    folder, place = str(store.folder), ["--layer", str(LAYER), "-f", str(feature)]
    assert main(["show", folder, *place, "--no-model", "-n", "1"]) == 0
    assert "[at chance]" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["show", folder, *place, "--no-model", "-n", "1", "--json", "--html", str(page)]) == 0
    shown = json.loads(capsys.readouterr().out)["label"]
    assert (shown["at_chance"], shown["text"]) == (True, '".", ","')
    assert "[at chance]" in page.read_text(encoding="utf-8")
    assert main(["export", folder, "--to", "statistics", "-o", str(tmp_path / "s.csv")]) == 0
    capsys.readouterr()
    header, *rows = list(csv.reader((tmp_path / "s.csv").read_text(encoding="utf-8").splitlines()))
    named = [dict(zip(header, row, strict=True)) for row in rows if row[header.index("label")]]
    assert [(one["label_at_chance"], one["label_detection"]) for one in named] == [("true", "0.48")]
    again = label_of(0.7, "greetings", "model", 0.9)
    assert Notes(store).label(LAYER, feature).text == '".", ","'
    Notes(store).add(make_label(LAYER, feature, fingerprint, again))
    assert Notes(store).label(LAYER, feature) == again, "a name above chance is shown rather than one at chance"
    Notes(store).add(make_label(LAYER, feature, fingerprint, label_of(0.4, "weather", "model", 0.99)))
    assert Notes(store).label(LAYER, feature) == again
    assert main(["find", folder, "--label", "weather"]) == 0
    assert "[at chance] weather" in " ".join(capsys.readouterr().out.split())


def test_the_label_command_counts_those_at_chance(capsys) -> None:
    found = {(5, 1): label_of(0.35), (5, 2): label_of(0.7, "greetings"), (5, 3): "too few contexts"}
    print_labelled(found, 3, False)
    out = capsys.readouterr().out
    assert "[at chance]" in out
    assert "1 of 2 names are at chance" in out
    print_labelled(found, 3, True)
    assert [one["at_chance"] for one in json.loads(capsys.readouterr().out)["labels"]] == [True, False]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_the_label_command_fails_where_no_feature_got_a_label(store: FeatureStore, capsys, as_json: list[str]) -> None:
    stats = store.stats(LAYER)
    silent = [
        f for f, tokens in zip(stats["feature"].to_pylist(), stats["tokens"].to_pylist(), strict=True) if not tokens
    ]
    words = ["label", str(store.folder), "--summary", *as_json]
    assert main([*words, "-f", f"{LAYER}/{silent[0]},{LAYER}/{silent[1]}"]) == 2
    out, err = capsys.readouterr()
    assert "none of the 2 features got a label" in err
    assert len(err.strip().splitlines()) == 1
    assert not as_json or len(json.loads(out)["without"]) == 2
    assert main([*words, "-f", f"{LAYER}/{silent[0]},{LAYER}/{busy(store)[0]}"]) == 0
