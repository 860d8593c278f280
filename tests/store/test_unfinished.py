"""What is left of a run that ended early: as much as was finished, and nothing that stands in the way of the next."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import stores
import tiny

from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.files import lock_folder
from qwen_scope.sae import Identity, TopK, save_sae
from qwen_scope.scope import ExtractOptions, Progress, extract
from qwen_scope.store import FeatureStore
from qwen_scope.text import Corpus, Counted

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]


class Killed(BaseException):
    """Stands for the end of the process."""


def run(folder: Path, rows: list | Path, until: int | None = None, name: str = "list", **options) -> FeatureStore:
    """An extraction, ended where so many tokens are in the store or on their way."""

    def report(now: Progress) -> None:
        if until is not None and now.tokens >= until:
            raise Killed

    corpus = Corpus(rows, name=name) if isinstance(rows, list) else Corpus(rows, column=options.pop("column", "text"))
    saes = {layer: stores.saes()[layer] for layer in options.pop("layers", stores.LAYERS)}
    chosen = ExtractOptions(
        **{"row_tokens": stores.ROW_TOKENS, "batch_tokens": 80, "counted": Counted.everything(), **options}
    )
    return extract(corpus, stores.loaded(), saes, folder, chosen, report)


def sizes(folder: Path) -> list[int]:
    """Tokens of the finished windows of an unfinished store."""
    return [json.loads(path.read_text())["tokens"] for path in sorted((folder / "work").glob("window-*.json"))]


def another_sae(layer: int) -> TopK:
    """One for the same place with other weights."""
    made = tiny.random_sae(layer, d_sae=64)
    weights = made.W_enc, made.W_dec, made.b_enc, made.b_dec
    return TopK(*weights, k=made.k, hook_point=made.hook_point, identity=Identity("SAE", layer, "f" * 64))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A store with some finished windows."""
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": t, "other": t}) + "\n" for t in stores.TEXTS))
    with pytest.raises(Killed):
        run(tmp_path / "s", tmp_path / "c.jsonl", until=250, window_tokens=100)
    assert len(sizes(tmp_path / "s")) >= 2
    return tmp_path / "s"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"column": "other"}, ["column was 'text', now 'other'"]),
        ({"window_tokens": 99}, ["window_tokens was 100, now 99"]),
        ({"row_tokens": 7, "max_tokens": 9}, ["row_tokens was 40, now 7", "max_tokens was None, now 9"]),
        ({"layers": (0,)}, ["layers was [0, 2], now [0]"]),
        ({"pool": ("mean",)}, ["pool was [], now ['mean']"]),
    ],
)
def test_the_options_that_differ_are_named_and_no_others(begun: Path, change: dict, said: list[str]) -> None:
    before = stores.digest(begun)
    with pytest.raises(InputError) as caught:
        run(begun, begun.parent / "c.jsonl", **{"window_tokens": 100, **change})
    for one in said:
        assert one in str(caught.value)
    told = str(caught.value).split("(", 1)[1].split(");")[0]
    if "layers" not in change:
        assert len(told.split("; ")) == len(said)
    assert stores.digest(begun) == before


def test_a_corpus_that_has_grown_or_another_is_named(begun: Path) -> None:
    path = begun.parent / "c.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(InputError, match=r"\(the size of c\.jsonl was \d+, now \d+\)"):
        run(begun, path, window_tokens=100)
    path.rename(path.with_name("d.jsonl"))
    with pytest.raises(InputError, match=r"corpus was \['c\.jsonl'\], now \['d\.jsonl'\]"):
        run(begun, path.with_name("d.jsonl"), window_tokens=100)


def test_long_values_are_shown_where_they_part(tmp_path: Path) -> None:
    name = "x" * 100
    with pytest.raises(Killed):
        run(tmp_path / "s", stores.TEXTS, until=250, name=name + "a" + name, window_tokens=100)
    with pytest.raises(InputError, match=r"\(corpus was …x+ax+…, now …x+bx+…\);"):
        run(tmp_path / "s", stores.TEXTS, name=name + "b" + name, window_tokens=100)


@pytest.mark.slow
def test_a_wrong_option_leaves_nothing_behind(tmp_path: Path, capsys) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "hello hello"}\n' * 3)
    words = ["extract", str(tmp_path / "c.jsonl"), "-o", str(tmp_path / "new" / "s"), *WHERE, "--layers", "0"]
    for wrong, said in (
        (["--column", "body"], "no document to extract"),
        (["--pool", "median"], "pooled by"),
        (["--row", "0"], "row"),
    ):
        assert main([*words, *wrong]) == 2
        assert said in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl"]
    assert main(words) == 0
    assert main([*words, "--column", "body"]) == 2
    assert "column was 'text', now 'body'" in capsys.readouterr().err
    inside = ["extract", str(tmp_path), "-o", str(tmp_path / "t"), *WHERE]
    assert main(inside) == 2
    assert "which is read" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_in_which_nothing_is_finished_is_taken_anew(tmp_path: Path) -> None:
    """As a killed run leaves it: a request, a lock file, a part, a window of unreadable rows."""
    work = tmp_path / "s" / "work"
    work.mkdir(parents=True)
    (work / "request.json").write_text("{}")
    (work / "lock").write_text("")
    marker = {"parts": [], "documents": 0, "tokens": 0, "unreadable": {"empty": 9}, "layers": {}, "state": {}}
    (work / "window-000000.json").write_text(json.dumps(marker))
    (tmp_path / "s" / ".lock").write_text("1")
    (tmp_path / "s" / ".unfinished-1-00000000.json").write_text("{")
    (tmp_path / "s" / "tokens").mkdir()
    (tmp_path / "s" / "tokens" / "000000.parquet").write_text("torn")
    run(tmp_path / "s", stores.TEXTS).close()
    run(tmp_path / "t", stores.TEXTS).close()
    assert stores.digest(tmp_path / "s") == stores.digest(tmp_path / "t")


def test_a_run_killed_after_its_last_file_is_tidied(tmp_path: Path) -> None:
    run(tmp_path / "s", stores.TEXTS).close()
    before = stores.digest(tmp_path / "s")
    (tmp_path / "s" / "work").mkdir()
    (tmp_path / "s" / ".lock").write_text("123456")
    run(tmp_path / "s", stores.TEXTS).close()
    assert stores.digest(tmp_path / "s") == before
    with lock_folder(tmp_path / "s"):  # a label run, say: a finished store is only read
        run(tmp_path / "s", stores.TEXTS).close()


@pytest.mark.slow
def test_windows_grow_so_that_an_early_end_loses_little(tmp_path: Path, monkeypatch) -> None:
    module = sys.modules["qwen_scope.scope.extract"]
    assert module.FIRST_WINDOW == 2_048  # here it is smaller, and the corpus with it
    monkeypatch.setattr(module, "FIRST_WINDOW", first := 256)
    rows = stores.TEXTS * 3
    with pytest.raises(Killed):
        run(tmp_path / "s", rows, until=first + 40)
    assert first <= sizes(tmp_path / "s")[0] < first + stores.ROW_TOKENS
    run(tmp_path / "s", rows).close()
    with run(tmp_path / "whole", rows) as whole:
        total = whole.manifest.tokens
    assert total > 3 * first
    assert stores.digest(tmp_path / "s") == stores.digest(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "t", rows, until=total)
    assert [round(n / first) for n in sizes(tmp_path / "t")] == [1, 2]
    # On a machine that takes longer than half a minute they don't grow.
    monkeypatch.setattr(module, "LONGEST_WINDOW", -1.0)
    with pytest.raises(Killed):
        run(tmp_path / "u", rows, until=total)
    assert {round(n / first) for n in sizes(tmp_path / "u")} == {1}
    assert len(sizes(tmp_path / "u")) >= 3
    # Windows that which tokens count was measured on are read once and written as they were.
    run(tmp_path / "m", rows, counted=None).close()
    with pytest.raises(Killed):
        run(tmp_path / "n", rows, until=first + 40, counted=None)
    assert sizes(tmp_path / "n")
    run(tmp_path / "n", rows, counted=None).close()
    assert stores.digest(tmp_path / "n") == stores.digest(tmp_path / "m")


@pytest.fixture
def project(tmp_path: Path, monkeypatch, capsys) -> Path:
    """A folder with one's own SAEs and a store made from within it, all by relative names."""
    home = tmp_path / "project"
    home.mkdir()
    monkeypatch.chdir(home)
    for layer in stores.LAYERS:
        save_sae(stores.saes()[layer], "mine")
    shutil.copytree(tiny.folder() / "model", "lm")
    (home / "c.txt").write_text("hello hello\n\nhello friend\n")
    named = ["--model", "./lm", "--sae", "mine", "--device", "cpu"]
    assert main(["extract", "c.txt", "-o", "stores/s", *named]) == 0
    capsys.readouterr()
    return home


@pytest.mark.slow
def test_a_store_knows_where_its_saes_and_its_model_are(project: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def shown(store: Path) -> tuple[int, str]:
        code = main(["show", str(store), "--layer", "0", "-f", "3", "--device", "cpu", "--json"])
        return code, capsys.readouterr().err

    sources = json.loads((project / "stores" / "s" / "manifest.json").read_text())["sources"]
    assert sources["saes"] == {"path": str(project / "mine"), "relative": "../../mine"}
    assert sources["model"] == {"path": str(project / "lm"), "relative": "../../lm"}
    monkeypatch.chdir(tmp_path)
    assert shown(project / "stores" / "s") == (0, "")
    shutil.copytree(project / "stores" / "s", tmp_path / "elsewhere")  # the store alone
    assert shown(tmp_path / "elsewhere") == (0, "")
    project.rename(tmp_path / "renamed")  # all together
    assert shown(tmp_path / "renamed" / "stores" / "s") == (0, "")
    assert shown(tmp_path / "elsewhere")[0] == 2
    (tmp_path / "renamed").rename(project)
    (project / "mine").rename(project / "yours")
    code, said = shown(project / "stores" / "s")
    assert (code, said.count("\n")) == (2, 1)
    assert f"lay in {project / 'mine'}, where nothing is now; say where with --sae FOLDER" in said
    words = ["show", str(project / "stores" / "s"), "--layer", "0", "-f", "3", "--device", "cpu", "--json"]
    assert main([*words, "--sae", str(project / "yours")]) == 0
    for layer in stores.LAYERS:  # others in their place
        save_sae(another_sae(layer), project / "mine")
    code, said = shown(project / "stores" / "s")
    assert (code, said.count("\n")) == (2, 1)
    assert "was made with the SAE" in said


@pytest.mark.slow
def test_of_two_places_the_weights_decide(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other" / "stores" / "s"
    shutil.copytree(project / "stores" / "s", copy)
    for layer in stores.LAYERS:
        save_sae(another_sae(layer), tmp_path / "other" / "mine")
    assert FeatureStore(copy).source("saes") == str(project / "mine")
    shutil.rmtree(tmp_path / "other" / "mine")
    shutil.copytree(project / "mine", tmp_path / "other" / "mine")
    assert FeatureStore(copy).source("saes") == str(tmp_path / "other" / "mine")


@pytest.mark.slow
def test_a_store_of_an_earlier_writer_opens_and_asks(project: Path, capsys) -> None:
    path = project / "stores" / "s" / "manifest.json"
    data = json.loads(path.read_text())
    del data["sources"]
    path.write_text(json.dumps(data))
    with FeatureStore(path.parent) as store:
        assert store.source("saes") is None
        assert store.source("model") is None
    assert main(["show", str(path.parent), "--layer", "0", "-f", "3", "--device", "cpu"]) == 2
    assert (
        "does not say where its SAEs 'SAE-Res-Tiny-W96-L0_6' are; name them with --sae FOLDER"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("sources", [[], {"saes": "x"}, {"saes": {"path": 3}}, {"saes": {"path": None}}, None, "x"])
def test_odd_sources_are_refused(project: Path, sources: object) -> None:
    path = project / "stores" / "s" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sources": sources}))
    with pytest.raises(FormatError, match="does not fit"):
        FeatureStore(path.parent)


@pytest.mark.slow
def test_a_place_that_is_none_is_one_sentence(project: Path) -> None:
    path = project / "stores" / "s" / "manifest.json"
    for place in ({}, {"path": ""}, {"path": "/no/where"}, {"relative": "../nowhere"}, {"path": "x\0y"}):
        path.write_text(json.dumps({**json.loads(path.read_text()), "sources": {"saes": place}}))
        with FeatureStore(path.parent) as store, pytest.raises(NotFoundError, match="--sae FOLDER"):
            store.source("saes")
