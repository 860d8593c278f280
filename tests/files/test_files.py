"""Outputs are whole or absent, folders have one writer, journals survive the death of theirs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import full_after

from qwen_scope.errors import FormatError, InputError, QwenScopeWarning
from qwen_scope.files import (
    append_lines,
    check_output,
    lock_folder,
    not_onto_itself,
    read_lines,
    write_folder,
    write_text,
    write_whole,
)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_output_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out.json"
    with write_whole(target) as part:
        part.write_text("new")
        assert not target.exists()
        assert part.suffix == ".json"
    assert target.read_text() == "new"
    assert left(target.parent) == ["out.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_a_failure_keeps_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").write_text("old")

    def fails() -> None:
        with write_whole(tmp_path / "out") as part:
            part.write_text("ne")
            raise error

    with pytest.raises(error):
        fails()
    assert (tmp_path / "out").read_text() == "old"
    assert left(tmp_path) == ["out"]


def test_links_stay_links_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_text(link, "new\r\n")
    assert link.is_symlink()
    assert real.read_bytes() == b"new\r\n"
    assert real.stat().st_mode & 0o777 == 0o600


def test_an_output_at_a_uri_is_held_against_inputs_there() -> None:
    for out in ("s3://bucket/corpus", "s3://bucket/corpus/store", Path("s3://bucket/corpus/store")):
        with pytest.raises(
            InputError, match=r"is or lies in s3://bucket/corpus, which is read; name an output outside"
        ):
            not_onto_itself(out, "lab", "s3://bucket/corpus/")
    not_onto_itself("s3://bucket/corpus-2", "s3://bucket/corpus", "corpus")


def test_a_device_is_written_straight(tmp_path: Path) -> None:
    with write_whole("/dev/null") as part:
        assert part == Path("/dev/null")
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE)
    write_text(fifo, "through")
    assert reader.communicate()[0] == b"through"
    assert fifo.is_fifo()


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        write_text(tmp_path, "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="can't write"):
        write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(InputError, match="can't write"):
        write_text(tmp_path / ("n" * 300), "x")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    journal = tmp_path / "journal"
    with full_after(1000):
        with pytest.raises(InputError, match="File too large"):
            write_text(target, "x" * 5000)
        append_lines(journal, [json.dumps("y" * 500)])
        with pytest.raises(InputError, match="File too large"):
            append_lines(journal, [json.dumps("z" * 700)])
    assert target.read_text() == "old"
    assert read_lines(journal) == [json.dumps("y" * 500)]
    assert left(tmp_path) == ["journal", "out"]


def test_an_output_is_none_of_its_inputs(tmp_path: Path) -> None:
    corpus, folder = tmp_path / "c.jsonl", tmp_path / "store"
    corpus.write_text("{}")
    folder.mkdir()
    os.link(corpus, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(corpus)
    for name in (corpus, tmp_path / "hard", tmp_path / "soft", tmp_path / "store" / ".." / "c.jsonl"):
        with pytest.raises(InputError, match="name another output"):
            not_onto_itself(name, corpus)
    for name in (folder, folder / "a", folder / "b" / "c"):
        with pytest.raises(InputError, match="outside of it"):
            not_onto_itself(name, folder)
    not_onto_itself(tmp_path / "other", corpus, folder, tmp_path / "absent")
    not_onto_itself("/dev/null", corpus, "/dev/null")


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    place = tmp_path / "out"
    held = (
        "import sys, time; from qwen_scope.files import lock_folder\n"
        "with lock_folder(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", held, str(place)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"process {child.pid}\) is writing to .*out; wait"), lock_folder(place):
        pass
    child.kill()
    child.wait()
    child.stdout.close()
    with lock_folder(place):  # the dead one's file is no obstacle
        with pytest.raises(InputError, match=str(os.getpid())), lock_folder(place):
            pass
        assert left(place) == [".lock"]
    assert left(place) == []


def test_lines_end_at_newline_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    texts = ["a\u2028b", "c\u0085d", "e\x0bf", "g\x1ch", "\r"]
    append_lines(path, (json.dumps(text, ensure_ascii=False) for text in texts))
    assert [json.loads(line) for line in read_lines(path)] == texts
    assert read_lines(tmp_path / "absent") == []


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    first, second = json.dumps({"a": 1}), json.dumps({"text": "ü" * 12, "b": 2}, ensure_ascii=False)
    whole = f"{first}\n{second}\n".encode()
    path.write_bytes(whole[:-cut])
    if cut == 1:  # only the end of the line is missing: the value is whole
        assert read_lines(path) == [first, second]
    else:
        with pytest.warns(QwenScopeWarning, match="torn"):
            assert read_lines(path) == [first]
    append_lines(path, [second])
    assert read_lines(path) == ([first, second, second] if cut == 1 else [first, second])


def test_a_long_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": 1}\n{"b": "' + "x" * 200_000)
    append_lines(path, ['{"c": 3}'])
    assert read_lines(path) == ['{"a": 1}', '{"c": 3}']


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"a": 1}\n"\xff"\n{}\n')
    with pytest.raises(FormatError, match=r"line 2 of .* is not UTF-8"):
        read_lines(path)


def test_an_error_of_the_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=os.strerror(errno.EISDIR)):
        append_lines(tmp_path, ["x"])


def child(script: str, *args: str | Path, **more) -> subprocess.Popen:
    """Another process that has said it is ready."""
    started = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, text=True, **more
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def killed(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    process.kill()
    process.wait()
    process.stdout.close()


WRITING = (
    "import sys, time; from qwen_scope.files import write_whole\n"
    "with write_whole(sys.argv[1]) as part: part.write_text('half'); print('ready', flush=True); time.sleep(60)"
)
FILLING = (
    "import sys, time; from qwen_scope.files import write_folder\n"
    "with write_folder(sys.argv[1]) as part:\n"
    "    (part / 'a').write_text('half'); print('ready', flush=True); time.sleep(60)"
)


def test_what_a_dead_writer_left_is_removed_and_a_live_ones_file_stays(tmp_path: Path) -> None:
    dead, live = child(WRITING, tmp_path / "a"), child(WRITING, tmp_path / "b")
    killed(dead)
    (tmp_path / f".unfinished-{'0' * 32}.pt").write_text("from an older version")
    (tmp_path / ".unfinished-mine.txt").write_text("not one of ours")
    assert len(left(tmp_path)) == 4
    write_text(tmp_path / "a", "whole")
    names = left(tmp_path)
    assert [name for name in names if not name.startswith(f".unfinished-{live.pid}-")] == [
        ".unfinished-mine.txt",
        "a",
    ]
    assert len(names) == 3
    killed(live)
    (tmp_path / "below").mkdir()
    os.rename(tmp_path / next(n for n in names if str(live.pid) in n), tmp_path / "below" / ".unfinished-1-00000000")
    with lock_folder(tmp_path):  # whoever takes the folder tidies it
        assert left(tmp_path / "below") == []


def test_folders_made_for_an_output_that_failed_go_again(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        with write_whole(path):
            raise ValueError("no more")

    for path in (tmp_path / "deep" / "er" / "out", tmp_path / "deep" / "out"):
        with pytest.raises(ValueError, match="no more"):
            fails(path)
    assert left(tmp_path) == []
    with lock_folder(tmp_path / "a" / "b"):
        pass
    assert left(tmp_path) == []


def test_a_protected_file_and_odd_targets_are_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    kept.chmod(0o400)
    if os.access(kept, os.W_OK):  # the superuser may write everything
        write_text(kept, "new")
    else:
        with pytest.raises(InputError, match="Permission denied"):
            write_text(kept, "new")
    import socket

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(InputError, match="a device or a socket"):
            write_text(tmp_path / "socket", "x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="can't write"), write_whole(tmp_path / "loop" / "below"):
        pass
    with pytest.raises(InputError, match=r"can't write .*nothing"):
        write_text("/proc/nothing/out", "x")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_a_stream_is_added_to_and_never_emptied(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    script = (
        "import sys; from qwen_scope.files import write_text\n"
        "print('before'); write_text(sys.argv[1], 'out\\n'); print('after')"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "link") if name == "link" else name]
    log = tmp_path / "log"
    log.write_text("old\n")
    with log.open("a") as file:
        subprocess.run(argv, stdout=file, check=True)
    assert log.read_text() == "old\nbefore\nout\nafter\n"
    assert subprocess.run(argv, capture_output=True, check=True, text=True).stdout == "before\nout\nafter\n"


def test_a_whole_folder_appears_at_once(tmp_path: Path) -> None:
    with write_folder(tmp_path / "new" / "out") as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("x")
        assert not (tmp_path / "new" / "out").exists()
    assert left(tmp_path / "new") == ["out"]
    assert left(tmp_path / "new" / "out") == ["sub"]
    (tmp_path / "empty").mkdir()
    with write_folder(tmp_path / "empty") as part:
        (part / "a").write_text("x")
    assert left(tmp_path / "empty") == ["a"]

    def fails(replace: bool) -> None:
        with write_folder(tmp_path / "empty", replace=replace) as part:
            (part / "b").write_text("y")
            raise KeyboardInterrupt

    with pytest.raises(InputError, match="is not empty"):
        fails(False)
    with pytest.raises(KeyboardInterrupt):
        fails(True)
    assert left(tmp_path / "empty") == ["a"]
    with write_folder(tmp_path / "empty", replace=True) as part:
        (part / "b").write_text("y")
    assert left(tmp_path / "empty") == ["b"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"), write_folder(tmp_path / "file", replace=True):
        pass
    assert left(tmp_path) == ["empty", "file", "new"]


def test_the_folder_one_stands_in_is_filled_and_stays(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    with write_folder(".") as part:
        (part / "a").write_text("x")
    assert tmp_path.stat().st_ino == before
    assert left(tmp_path) == ["a"]


def test_a_killed_folder_is_begun_anew_and_a_live_one_refused(tmp_path: Path) -> None:
    writer = child(FILLING, tmp_path / "out")
    said = rf"another process \(process {writer.pid}\) is writing"
    with pytest.raises(InputError, match=said), write_folder(tmp_path / "out"):
        pass
    killed(writer)
    assert left(tmp_path) == [".unfinished-out"]
    with write_folder(tmp_path / "out") as part:
        assert left(part) == [".lock"]
        (part / "b").write_text("x")
    assert left(tmp_path) == ["out"]
    # Killed between the two renames of a replacement: the old folder comes back.
    os.rename(tmp_path / "out", tmp_path / ".unfinished-out.before")
    with pytest.raises(InputError, match="is not empty"), write_folder(tmp_path / "out"):
        pass
    assert left(tmp_path / "out") == ["b"]


def test_two_writers_of_a_journal_lose_nothing(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    script = (
        "import sys, json; from qwen_scope.files import append_lines\n"
        "print('ready', flush=True)\n"
        "for i in range(100): append_lines(sys.argv[1], [json.dumps([sys.argv[2], i, 'x' * 3000])])"
    )
    writers = [child(script, journal, name) for name in "ab"]
    for writer in writers:
        assert writer.wait(60) == 0
        assert writer.stdout is not None
        writer.stdout.close()
    found = [json.loads(line)[:2] for line in read_lines(journal)]
    assert sorted(found) == sorted([name, i] for name in "ab" for i in range(100))


def test_check_output_refuses_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "file", "is what is read"),
        (tmp_path / "out.txt", "has to end in .json or .yaml"),
    ):
        with pytest.raises(InputError, match=said):
            check_output(path, tmp_path / "file", endings=[".json", ".yaml"] if path.suffix == ".txt" else [])
    check_output(tmp_path / "new" / "deep" / "out", tmp_path / "file")
    check_output("/dev/stdout", tmp_path / "file")
    assert left(tmp_path) == ["file"]
