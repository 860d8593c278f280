"""Corpora, SAEs, recipes and stores at URIs are read where they lie, and give what the same files here give."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores
import tiny

from qwen_scope.cli import main
from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.files import Remote, place
from qwen_scope.sae import layers_of, load_sae
from qwen_scope.steer import Intervention, Recipe, load_recipe
from qwen_scope.store import FeatureStore, is_store
from qwen_scope.text import Corpus


@pytest.fixture(autouse=True)
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty memory file system."""
    made = fsspec.filesystem("memory")
    made.store.clear()
    made.pseudo_dirs[:] = [""]
    yield made
    made.store.clear()


def copied(folder: Path, to: str) -> str:
    """A folder's files under a URI."""
    fsspec.filesystem("memory").put(str(folder), to, recursive=True)
    return to


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "s"
    stores.make(folder, pool=("mean",)).close()
    return folder


def corpus(folder: Path) -> Path:
    """A file of every kind, one in a folder below, and one that is no corpus."""
    (folder / "below").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in stores.ROWS[:5]) + "{broken\n"
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.txt").write_text("One paragraph.\nIts end.\n\nAnother.\n")
    (folder / "d.csv").write_text('text,n\n"a, b",1\nc,2\n')
    pq.write_table(pa.Table.from_pylist(stores.ROWS[:3]), folder / "below" / "e.parquet")
    (folder / "f.parquet.gz").write_bytes(gzip.compress((folder / "below" / "e.parquet").read_bytes()))
    (folder / "notes.md").write_text("none")
    return folder


def test_a_corpus_at_a_uri_gives_the_documents_of_the_same_files(tmp_path) -> None:
    here = corpus(tmp_path)
    there = copied(here, "memory://bucket/corpus")
    expected, found = list(Corpus(here).rows()), list(Corpus(there).rows())
    assert len(expected) > 15
    assert found == expected
    assert Corpus(there).description == {**Corpus(here).description, "sources": Corpus(here).description["sources"]}
    assert list(Corpus(f"{there}/d.csv")) == list(Corpus(here / "d.csv"))
    assert list(Corpus(f"file://{here}/d.csv")) == list(Corpus(here / "d.csv"))
    for after in range(0, len(expected), 4):
        first, second = Corpus(there), Corpus(there)
        rows = first.rows()
        for _ in range(after):
            next(rows)
        second.seek(first.cursor())
        assert list(second.rows()) == expected[after:]


def test_saes_at_a_uri_are_those_of_the_same_files(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    there = copied(tiny.folder() / "sae", "memory://bucket/SAE-Tiny")
    assert layers_of(there) == [0, 2]
    for name, layer in ((there, 2), (f"{there}/layer2.sae.pt", None)):
        if layer is None and not place(name).exists():
            continue
        mine, theirs = load_sae(tiny.folder() / "sae", 2), load_sae(name, layer)
        assert theirs.identity.fingerprint == mine.identity.fingerprint
        assert (theirs.W_enc == mine.W_enc).all()
    with pytest.raises(InputError, match="is no repository and has no revisions"):
        load_sae(there, 2, revision="main")
    with pytest.raises(NotFoundError, match="there is no file or folder memory://bucket/none"):
        load_sae("memory://bucket/none", 2)


def test_a_recipe_at_a_uri(tmp_path) -> None:
    scope = stores.scope()
    made = Recipe.of("r", scope.model, [Intervention.add(layer=2, feature=17, amount=1.0)], {2: scope.saes[2]})
    made.save(tmp_path / "r.yaml")
    copied(tmp_path / "r.yaml", "memory://bucket/r.yaml")
    assert load_recipe("memory://bucket/r.yaml") == made
    with pytest.raises(NotFoundError, match=r"there is no recipe 'memory://bucket/s.yaml'"):
        load_recipe("memory://bucket/s.yaml")
    with pytest.raises(InputError, match=r"memory://bucket/t.yaml can be read but not written"):
        made.save("memory://bucket/t.yaml")


def test_a_store_at_a_uri_answers_as_the_same_folder(store, memory) -> None:
    there = copied(store, "memory://bucket/s")
    memory.pipe("/bucket/secret.csv", b"a\n1\n")
    assert is_store(there)
    with FeatureStore(store) as a, FeatureStore(there) as b:
        b.verify()
        assert b.manifest == a.manifest
        for query in ("SELECT * FROM stats", "SELECT count(*), sum(value) FROM activations", "SELECT * FROM documents"):
            assert b.sql(query) == a.sql(query)
        assert b.contexts(0, 3, 4) == a.contexts(0, 3, 4)
        assert b.firing("mean", [2]) == a.firing("mean", [2])
        assert (b.residuals(0) == a.residuals(0)).all()
        assert b.source("model") == a.source("model")
        for query in ("FROM read_csv('memory://bucket/secret.csv')", f"FROM read_json('{store}/manifest.json')"):
            with pytest.raises(InputError, match="Permission Error"):
                b.sql(query)


def test_commands_take_uris(store, capsys) -> None:
    there = copied(store, "memory://bucket/s")
    answers = []
    for folder in (str(store), there):
        assert main(["store", folder, "--feature", "0/3", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert main(["store", there, "--sql", "SELECT count(*) AS n FROM documents", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"n": 17}]
    assert main(["label", there, "--features", "0/3", "--summary"]) == 2
    assert "memory://bucket/s can be read but not written" in capsys.readouterr().err
    assert main(["train", "lab", "-o", "memory://bucket/t", "--d-sae", "64", "--k", "4", "--tokens", "4096"]) == 2
    assert "memory://bucket/t can be read but not written" in capsys.readouterr().err


def test_damage_at_a_uri_is_named(store, memory) -> None:
    there = copied(store, "memory://bucket/s")
    part = next(name for name in memory.find("/bucket/s") if "/tokens/" in name)
    content = memory.cat_file(part)
    memory.pipe(part, content[:-4])
    with pytest.raises(Exception, match=r"it was cut off or changed"):
        FeatureStore(there)
    memory.rm(part)
    with pytest.raises(NotFoundError, match="lacks its part memory://bucket/s/tokens"):
        FeatureStore(there)
    memory.rm("/bucket/s/manifest.json")
    with pytest.raises(NotFoundError, match=r"memory://bucket/s has no manifest.json"):
        FeatureStore(there)


def test_what_does_not_answer_is_one_sentence(capsys, tmp_path) -> None:
    for name, said in (
        ("memory://bucket/none", "there is no"),
        ("momory://bucket/none", "momory://bucket/none is of no known protocol; did you mean 'memory'"),
        ("gs://bucket/none", "gs://bucket/none"),
        ("gs://bucket/none", "can't be reached: Please install gcsfs"),
        ("webhdfs://127.0.0.1:9/none", "; check the address and the network"),
    ):
        for argv in (["store", name], ["extract", name, "-o", str(tmp_path / "s")]):
            assert main(argv) == 2
            err = capsys.readouterr().err
            assert said in err
            assert err.count("\n") == 1
    assert Remote("memory://a/b") == place(Path("memory://a/b")) != place("memory://a/c")
