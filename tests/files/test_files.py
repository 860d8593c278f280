"""Outputs are whole or absent, folders have one writer, journals survive the death of theirs."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_scope.errors import FormatError, InputError, QwenScopeWarning
from qwen_scope.files import append_lines, lock_folder, not_onto_itself, read_lines, write_text, write_whole


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
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(InputError, match="File too large"):
            write_text(target, "x" * 5000)
        journal = tmp_path / "journal"
        append_lines(journal, [json.dumps("y" * 500)])
        with pytest.raises(InputError, match="File too large"):
            append_lines(journal, [json.dumps("z" * 700)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)
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
