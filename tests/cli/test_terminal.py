"""Nothing that comes from outside steers the terminal: hostile names, texts and answers through the real commands."""

from __future__ import annotations

import ast
import http.server
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.text import Text
from safetensors.torch import save_file

from qwen_scope import FeatureStore, load_scope
from qwen_scope.cli import main, output
from qwen_scope.features import Label, Notes, make_label
from qwen_scope.model import LoadedModel
from qwen_scope.report import Figure, Line, Points, element, figure_page, html_page, inert, table, visible  # noqa: F401
from qwen_scope.scope import extract
from qwen_scope.stats import Interval
from qwen_scope.text import Corpus

SRC = Path(__file__).parents[2] / "src"
LAYER = 5
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202egpj.exe\u2028next\u2066[bold red]x[/] [link=http://evil.example]y[/link]\r\b"
"""A title, a cleared screen, an 8-bit control, a delete, a reversed name, a hidden end of line, rich's markup."""
FINE = "Grüße, Übergrößen — مرحبا بالعالم — 中文，日本語 — नमस्ते — 👨‍👩‍👧‍👦 ❤️‍🔥 🇩🇪 — می‌خواهم — ﷽ — C:\\path\\x1b"


def steers(text: str, keep: str = "\n") -> list[str]:
    """The characters of a text that a terminal may obey."""
    bidi = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return [c for c in text if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in bidi) and c not in keep]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of hostile texts with hostile metadata, labels and notes."""
    scope = load_scope("lab", device="cpu")
    texts = [f"{EVIL} Guten Tag {i}. {EVIL}" if i % 2 else f"Please wait {i} hours." for i in range(30)]
    rows = [{"text": text, f"col{EVIL}": EVIL, "lang": EVIL if i % 2 else "de"} for i, text in enumerate(texts)]
    out = tmp_path_factory.mktemp("terminal") / "store"
    with extract(
        Corpus(rows, name=EVIL), LoadedModel(scope.model, scope.tokenizer, EVIL), {LAYER: scope.saes[LAYER]}, out
    ) as made:
        stats = made.stats(LAYER)
        feature = int(stats["feature"][int(abs(stats["documents"].to_numpy().astype(int) - 15).argmin())].as_py())
    with FeatureStore(out) as opened:
        notes, good = Notes(opened), Interval(0.9, 0.8, 1.0, 10)
        label = Label(f"name {EVIL}", good, good, f"judge {EVIL}", f"scorer {EVIL}")
        notes.add(make_label(LAYER, feature, opened.layer(LAYER).fingerprint, label))
        notes.write(LAYER, feature, f"note {EVIL} {FINE}", f"Ann {EVIL}")
        notes.verdict(LAYER, feature, {"outcome": f"causal {EVIL}", "reasons": [f"yes {EVIL}"]})
    (out.parent / "feature").write_text(str(feature))
    return out


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Hostile files, each of which some command refuses by name or by content."""
    odd = tmp_path / f"a{EVIL.replace('/', '|')}b"
    odd.mkdir()
    (tmp_path / "odd").write_text(odd.name)
    tensors = tmp_path / "tensors"
    tensors.mkdir()
    save_file({f"W{EVIL}": torch.ones(2, 2)}, str(tensors / "layer3.sae.safetensors"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    buffer = io.BytesIO()
    torch.save({"W_enc": torch.ones(2, 2)}, buffer)
    name = EVIL.replace("\u2028", "").replace("\r", "").encode()
    data = b"\x80\x02c" + name + b"\n" + name + b"\n)R."
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(pickled / "layer3.sae.pt", "w") as new:
        for one in old.namelist():
            new.writestr(one, data if one.endswith("data.pkl") else old.read(one))
    recipe = {"format": f"qwen-scope-recipe{EVIL}", "version": 1, f"key{EVIL}": EVIL, "name": EVIL}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": EVIL, f"key{EVIL}": 1}))
    (tmp_path / "rule.json").write_text(json.dumps({f"rule{EVIL}": EVIL}))
    (tmp_path / "verdict.json").write_text(json.dumps([EVIL]))
    return tmp_path


COMMANDS = {
    "tensor names": ["convert", "{files}/tensors", "-o", "{files}/out"],
    "pickle imports": ["convert", "{files}/pickled", "-o", "{files}/out"],
    "file names": ["features", "x", "--sae", "{odd}"],
    "a model's name": ["features", "x", "--model", "{odd}/model", "--sae", "{odd}"],
    "a store's name": ["store", "{odd}"],
    "a corpus' name": ["extract", "{odd}.jsonl", "-o", "{files}/out"],
    "recipe fields": ["steer", "x", "--recipe", "{files}/recipe.json"],
    "recipe fields of YAML": ["steer", "x", "--recipe", "{files}/recipe.yaml"],
    "rule fields": ["classify", "predict", "{files}/rule.json", "{files}/verdict.json"],
    "an unknown command": ["no{evil}"],
    "an unknown option": ["store", "{store}", "--no{evil}"],
    "an option's value": ["store", "{store}", "--layer", "{evil}"],
    "a group": ["catalog", "{evil}"],
    "plan": ["plan", "{evil}"],
    "a text": ["features", "{evil} Guten Tag {evil}", "--layers", "5"],
    "two texts": ["compare", "{evil}", "Guten Tag {evil}"],
    "a steered text": ["steer", "{evil}", "--feature", "5/17", "--amount", "2", "--max-new-tokens", "4"],
    "a store": ["store", "{store}"],
    "contexts": ["store", "{store}", "--feature", "{feature}"],
    "cells": ["store", "{store}", "--sql", "SELECT text, meta FROM tokens JOIN documents USING (document) LIMIT 99"],
    "names of columns": ["store", "{store}", "--sql", "SELECT 1 AS \"{evil}\", '{evil}' AS b"],
    "a wrong query": ["store", "{store}", "--sql", "SELECT {evil}"],
    "labels found": ["find", "{store}", "--label", "name"],
    "labels not found": ["find", "{store}", "--label", "{evil}"],
    "groups": ["find", "{store}", "--groups", "lang"],
    "unknown groups": ["find", "{store}", "--groups", "{evil}"],
    "a page": ["show", "{store}", "--layer", "5", "-f", "{feature}"],
    "a summary": ["label", "{store}", "-f", "{feature}", "--summary", "--again", "--tests", "4", "--examples", "4"],
    "a verdict": ["label", "{store}", "-f", "{feature}", "--verdict", "{files}/verdict.json"],
    "an export": ["label", "{store}", "--export", "{odd}/x/y.jsonl"],
    "coverage": ["analyze", "coverage", "{store}"],
    "lab texts": ["lab", "texts", "--kind", "{evil}"],
}  # fmt: skip


def words(name: str, files: Path, store: Path) -> list[str]:
    places = {
        "{files}": str(files), "{store}": str(store), "{odd}": str(files / (files / "odd").read_text()),
        "{feature}": (store.parent / "feature").read_text(), "{evil}": EVIL,
    }  # fmt: skip
    return [re.sub(r"\{\w+\}", lambda found: places.get(found[0], found[0]), word) for word in COMMANDS[name]]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_lets_a_control_code_through(
    name: str, as_json: bool, files: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    for variable in ("OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    code = main([*words(name, files, store), *(["--json"] if as_json else [])])
    out, err = capsys.readouterr()
    assert code in (0, 2), err
    assert out or err
    assert not steers(out)
    assert not steers(err)
    if as_json and code == 0:
        json.loads(out)


def test_json_says_what_the_store_holds(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "store",
                str(store),
                "--sql",
                f"SELECT meta FROM documents WHERE document = 1 AND '{FINE}' <> ''",
                "--json",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert json.loads(json.loads(out)[0]["meta"]) == {f"col{EVIL}": EVIL, "lang": EVIL}
    for text in (EVIL, FINE, "\ud800", "\x00\x1f\x85\xa0\u2029", "\U0010ffff"):
        assert json.loads(output.json_text({text: [text]})) == {text: [text]}
        assert not steers(output.json_text({text: [text]}))
    assert FINE.replace("\\", "\\\\") in output.json_text(FINE)


def test_a_server_s_words_are_inert(store: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            data = json.dumps({"error": EVIL}, ensure_ascii=False).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
    monkeypatch.setenv("OPENAI_MODEL", f"m{EVIL}")
    try:
        feature = (store.parent / "feature").read_text()
        assert main(["label", str(store), "-f", feature, "--tests", "4", "--examples", "4"]) == 2
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    out, err = capsys.readouterr()
    assert "answers 400" in err
    assert not steers(out + err)


def test_ordinary_text_of_all_scripts_comes_through_unchanged(store: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["store", str(store), "--sql", f"SELECT '{FINE}' AS \"{FINE}\""]) == 0
    assert capsys.readouterr().out.count(FINE) == 2
    output.console().print(FINE, soft_wrap=True)
    output.write(FINE + "\n")
    assert capsys.readouterr().out == 2 * (FINE + "\n")
    feature = (store.parent / "feature").read_text()
    page = tmp_path / "page.html"
    assert main(["show", str(store), "--layer", "5", "-f", feature, "--no-model", "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert FINE.split("C:")[0] in html
    assert not steers(html, keep="\n\t")
    assert FINE.split("C:")[0] in html_page("x", element("p", FINE))
    for word in ("👨‍👩‍👧‍👦", "❤️‍🔥", "می‌خواهم", "नमस्ते"):
        assert visible(word) == word
    assert [visible(t) for t in ("\u200d", "a\u200db", "\u200dم", "م\u200d", "م\u200d\u200dم")] == [
        "\\u200d", "a\\u200db", "\\u200dم", "م\\u200d", "م\\u200d\\u200dم",
    ]  # fmt: skip


def test_markup_in_data_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    words = "[bold]a[/bold] [link=http://x]b[/link] :smile: [red]c [/] [not closed"
    output.console().print(words, soft_wrap=True)
    output.show(words, [words], [[words]])
    with output.status(words), output.progress() as report:
        report(words, 0.5, words)
    assert capsys.readouterr().out.count(words) == 4


def test_styles_stay_where_they_are() -> None:
    text = Text("a\x1bb", style="dim").append("\x9bc", style="bold")
    found = inert(text)
    assert found.plain == "a\\x1bb\\x9bc"
    assert [(s.start, s.end, str(s.style)) for s in found.spans] == [(6, 11, "bold")]
    assert inert(Text("plain")).plain == "plain"


def test_reports_are_inert() -> None:
    made = figure_page(EVIL, [(EVIL, [EVIL], [[EVIL]])], (), [EVIL])
    assert not steers(made, keep="\n\t")


@pytest.mark.slow
def test_in_a_terminal_only_our_own_colours_are_sent(store: Path) -> None:
    feature = (store.parent / "feature").read_text()
    env = {**os.environ, "PYTHONPATH": str(SRC), "FORCE_COLOR": "1", "COLUMNS": "200", "TERM": "xterm-256color"}
    args = ["show", str(store), "--layer", "5", "-f", feature, "--no-model"]
    done = subprocess.run([sys.executable, "-m", "qwen_scope.cli", *args], env=env, capture_output=True, timeout=120)
    out = done.stdout.decode("utf-8")
    assert done.returncode == 0, done.stderr
    assert "\x1b[" in out
    assert not steers(re.sub(r"\x1b\[[0-9;]*m", "", out))
    assert "\x1b]8" not in out  # a link


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_of_another_encoding_shows_any_text(encoding: str, store: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(SRC), "PYTHONIOENCODING": encoding}
    for more in ([], ["--json"]):
        args = ["store", str(store), "--sql", f"SELECT '{FINE}' AS a, meta FROM documents LIMIT 1", *more]
        command = [sys.executable, "-m", "qwen_scope.cli", *args]
        done = subprocess.run(command, env=env, capture_output=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, b"")
        out = done.stdout.decode(encoding)
        assert not steers(out)
        if more:
            assert json.loads(out)[0]["a"] == FINE


@pytest.mark.parametrize(
    "module",
    ["..", ".", "", "../{}", "a/{}", "/tmp/{}", "a\\{}", "{}\x00", "{0}", "{x}", "{:>99999999999}", "{", "é\n{}", EVIL],
)
def test_a_module_s_name_stays_in_the_output(module: str, store: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "deep" / "latents"
    assert main(["export", str(store), "--to", "delphi", "-o", str(out), "--module", module, "--context", "8"]) == 2
    err = capsys.readouterr().err
    assert "one name" in err
    assert not steers(err)
    assert not list(tmp_path.rglob("*.safetensors"))


# --- the door --------------------------------------------------------------------------------------------------------

DOOR = {"output.py", "entry.py", "lines.py"}


def prints() -> Iterator[str]:
    """Calls in the commands that print past the door."""
    for path in sorted((SRC / "qwen_scope" / "cli").glob("*.py")):
        if path.name in DOOR:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in {"print", "typer.echo", "typer.secho", "Console", "warnings.showwarning"} or re.fullmatch(
                    r"(sys\.)?(stdout|stderr)\.write|json\.dump|.*Console|rich\.print", called
                ):
                    yield f"{path.name}:{node.lineno}: {called}"


def test_the_commands_print_through_one_door() -> None:
    assert list(prints()) == []


def test_pickles_in_these_tests_name_what_they_say() -> None:
    """The hostile pickle is read far enough to be refused by the name it imports."""
    with pytest.raises((ModuleNotFoundError, pickle.UnpicklingError, AttributeError, ValueError)):
        pickle.loads(b"\x80\x02cno_such\nno_such\n)R.")
