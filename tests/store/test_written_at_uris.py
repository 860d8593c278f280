"""Stores are written at URIs without renames: parts are whole objects, and the manifest is what makes them a store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import loopback
import pytest
import stores
import tiny
from test_unfinished import Killed, run

from qwen_scope.cli import main
from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.files import claim_folder, place
from qwen_scope.scope import ExtractOptions, extract
from qwen_scope.store import FeatureStore, is_store, merge
from qwen_scope.text import Corpus, Counted

pytestmark = pytest.mark.slow

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a server on this machine."""
    with loopback.s3() as found:
        yield found


@pytest.fixture(params=["memory", "s3"])
def there(request, tmp_path) -> str:
    """A place for a store."""
    top = "memory://bucket" if request.param == "memory" else request.getfixturevalue("bucket")
    return f"{top}/{tmp_path.name}/s"


def files(uri: str) -> dict[str, bytes]:
    """Every file below a URI."""
    system, key = fsspec.core.url_to_fs(uri)
    system.invalidate_cache()
    return {name[len(key) :].lstrip("/"): system.cat_file(name) for name in system.find(key)}


def at_home(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_store_written_at_a_uri_is_that_of_a_folder(there: str, tmp_path: Path) -> None:
    with run(tmp_path / "here", stores.TEXTS, window_tokens=100, pool=("mean",)) as here:
        assert not is_store(there)
        with run(there, stores.TEXTS, window_tokens=100, pool=("mean",)) as written:
            assert written.contexts(0, 3, 4) == here.contexts(0, 3, 4)
            assert written.sql("SELECT * FROM stats") == here.sql("SELECT * FROM stats")
    assert files(there) == at_home(tmp_path / "here")
    run(there, stores.TEXTS, window_tokens=100, pool=("mean",)).close()  # opened at once
    with pytest.raises(InputError, match=r"window_tokens was 100, now 99"):
        run(there, stores.TEXTS, window_tokens=99, pool=("mean",))


def test_a_run_that_is_killed_leaves_no_store_and_goes_on(there: str, tmp_path: Path) -> None:
    for until in (150, 250):
        with pytest.raises(Killed):
            run(there, stores.TEXTS, until=until, window_tokens=100)
        assert not is_store(there)
        with pytest.raises(NotFoundError, match="it is no store, or one that is not finished"):
            FeatureStore(there)
    begun = [name for name in files(there) if name.startswith("work/window-")]
    assert len(begun) >= 2
    system, key = fsspec.core.url_to_fs(there)
    system.pipe_file(f"{key}/tokens/000077.parquet", b"of a window that was not finished")
    with pytest.raises(InputError, match=r"max_tokens was None, now 9"):
        run(there, stores.TEXTS, window_tokens=100, max_tokens=9)
    run(there, stores.TEXTS, window_tokens=100).close()
    run(tmp_path / "here", stores.TEXTS, window_tokens=100).close()
    assert files(there) == at_home(tmp_path / "here")


def test_of_two_writers_the_last_goes_on(there: str) -> None:
    with claim_folder(place(there)) as first:
        first()
        with claim_folder(place(there)) as second:
            second()
            with pytest.raises(InputError, match=r"another process has begun to write to .*, so this one stops"):
                first()
        with pytest.raises(InputError, match="another process has begun"):
            first()
    assert files(there) == {}


def test_other_content_is_left_alone(there: str) -> None:
    system, key = fsspec.core.url_to_fs(there)
    system.pipe_file(f"{key}/mine.txt", b"mine")
    with pytest.raises(InputError, match="exists and is no unfinished store; name a new folder"):
        run(there, stores.TEXTS)
    assert files(there) == {"mine.txt": b"mine"}


def test_shares_at_uris_are_merged_at_one(there: str, tmp_path: Path) -> None:
    options = ExtractOptions(row_tokens=40, counted=Counted.everything())
    for i in range(2):
        corpus = Corpus(stores.ROWS, rank=i, world=2)
        extract(corpus, stores.loaded(), stores.saes(), f"{there}-{i}", options).close()
    merge(there, [f"{there}-1", f"{there}-0"]).close()
    merge(tmp_path / "here", [f"{there}-0", f"{there}-1"]).close()
    assert files(there) == at_home(tmp_path / "here")


def test_commands_write_to_a_bucket(bucket: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stores.ROWS))
    words = ["extract", str(tmp_path / "c.jsonl"), *WHERE, "--json"]
    answers = []
    for out in (f"{bucket}/t", str(tmp_path / "t")):
        assert main([*words, "-o", out]) == 0
        answers.append(json.loads(capsys.readouterr().out))
        for more in (["store", out, "--feature", "0/3"], ["store", out, "--sql", "FROM documents"]):
            assert main([*more, "--json"]) == 0
            answers.append(json.loads(capsys.readouterr().out))
    for one in (answers[0], answers[3]):
        del one["store"]
    assert answers[:3] == answers[3:]


def test_where_a_store_can_t_be_written_is_one_sentence(bucket: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "c.txt").write_text("hello hello\n\nhello friend\n")
    for out, said in (
        ("s3://missing/s", "s3://missing/s/.lock can't be written: there is no bucket or folder above it"),
        ("gs://bucket/s", "can't be reached: Please install gcsfs"),
        ("momory://bucket/s", "momory://bucket/s is of no known protocol; did you mean 'memory'"),
    ):
        assert main(["extract", str(tmp_path / "c.txt"), "-o", out, *WHERE]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_what_an_object_store_refuses_is_one_sentence(bucket: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """The same for reading and writing: no credentials, no bucket, nobody at the address."""
    import s3fs
    from aiobotocore.httpsession import AIOHTTPSession

    asked, send = [], AIOHTTPSession.send

    def counted(session, request):
        asked.append(request.url)
        return send(session, request)

    (tmp_path / "c.txt").write_text("hello hello\n\nhello friend\n")
    corpus = str(tmp_path / "c.txt")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in (
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/x"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/x"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for words in (["store", f"{bucket}/t"], ["extract", corpus, "-o", f"{bucket}/u", *WHERE]):
            assert main(words) == 2
            err = capsys.readouterr().err
            assert "asks for credentials" in err
            assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in err
            assert err.count("\n") == 1
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setitem(fsspec.config.conf["s3"], "endpoint_url", "http://127.0.0.1:9")
        monkeypatch.setattr(AIOHTTPSession, "send", counted)
        s3fs.S3FileSystem.clear_instance_cache()
        assert main(["extract", corpus, "-o", f"{bucket}/u", *WHERE]) == 2
        err = capsys.readouterr().err
        assert "Could not connect to the endpoint URL" in err
        assert "; check the address and the network" in err
        assert err.count("\n") == 1
        # The client's own five tries for each question to the bucket took half a minute.
        assert 2 <= len(asked) <= 8
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.undo()
    assert main(["store", "s3://missing/s"]) == 2
    err = capsys.readouterr().err
    assert "there is no store 's3://missing/s'" in err
    assert err.count("\n") == 1
