"""One writer for every output: beside its target first, under its name only when it is whole."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen_scope.errors import InputError, brief, reason

from .uri import check_here, remote_uri

UNFINISHED = ".unfinished-"
PART = re.compile(re.escape(UNFINISHED) + r"([0-9]+-[0-9a-f]{8}|[0-9a-f]{32})(\..*)?")
DAY = 86_400
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
STREAM = re.compile(r"/dev/(stdin|stdout|stderr)|/(?:dev|proc/(self|[0-9]+))/fd/([0-9]+)")
STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}


@contextmanager
def write_whole(path: str | os.PathLike[str], what: str = "") -> Iterator[Path]:
    """Give a file to write beside `path`; it gets that name when the block ends well, and is removed otherwise.

    A link is followed, so what it points to is replaced and the link stays; an existing file keeps its permissions.
    Where `path` is a pipe, a terminal or `/dev/null` there is nothing to rename: the block writes it itself. A stream
    of this process that goes to a file, as `/dev/stdout` under `>> log`, gets the whole output added at its end.

    Args:
        path: the output; folders above it are made.
        what: what it is called in an error; default: its path.

    Raises:
        InputError: a folder has that name, it can't be written, or the disk is full.
    """
    check_here(path)
    target, named = Path(path), what or str(path)
    with told(named):
        if target.is_dir():
            raise InputError(f"{named} is a folder; name a file in it")
        kind = target.stat().st_mode if target.exists() else stat.S_IFREG
        if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
            sys.stdout.flush()
            yield target
        elif (stream := _stream_of(path)) is not None:
            with _added(stream, target) as part:
                yield part
        elif not stat.S_ISREG(kind):
            raise InputError(f"{named} is a device or a socket; name a file")
        else:
            with _beside(Path(os.path.realpath(target))) as part:
                yield part


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A file in the folder of the target that takes its name at the end."""
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    made = make_folder(target.parent)
    held = None
    part = target
    try:
        remove_stale(target.parent)
        part, held = _new_part(target)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        if target.exists():
            _keep_owner(target, part)
        os.replace(part, target)
        sync_folder(target.parent)
    except BaseException:
        if part != target:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise
    finally:
        if held is not None:
            os.close(held)


def _new_part(target: Path) -> tuple[Path, int | None]:
    """An empty file beside the target, held by a lock as long as its writer lives."""
    while True:
        part = target.with_name(f"{UNFINISHED}{os.getpid()}-{uuid.uuid4().hex[:8]}{target.suffix[:20]}")
        held = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if os.name == "nt":  # there an open file can't be renamed
            os.close(held)
            return part, None
        if take(held, part):
            return part, held
        os.close(held)  # taken for a dead one's and removed before it was locked


def take(held: int, path: Path) -> bool:
    """Lock an open file without waiting; False where another holds it, or the name has gone to another file."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(held, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:  # a file system without locks: better to write than to refuse
            raise
    try:
        return os.path.samestat(os.fstat(held), path.stat())
    except FileNotFoundError:
        return False


def remove_stale(folder: Path) -> None:
    """Remove the unfinished files in a folder whose writers are dead: nobody holds them."""
    for path in folder.iterdir():
        if PART.fullmatch(path.name) and not path.is_symlink():
            with suppress(OSError):
                _remove_if_free(path)


def _remove_if_free(path: Path) -> None:
    if os.name == "nt":
        if time.time() - path.stat().st_mtime > DAY:
            path.unlink()
        return
    held = os.open(path, os.O_RDWR)
    try:
        if take(held, path):
            path.unlink()
    finally:
        os.close(held)


def _keep_owner(target: Path, part: Path) -> None:
    shutil.copymode(target, part)
    before, now = target.stat(), part.stat()
    if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        with suppress(OSError):  # only the superuser may give a file away
            os.chown(part, before.st_uid, before.st_gid)
            shutil.copymode(target, part)


def _stream_of(path: str | os.PathLike[str]) -> int | None:
    """The descriptor of this process that a name such as `/dev/stdout` stands for, also behind links; else None."""
    here = os.path.abspath(path)
    for _ in range(40):
        if match := STREAM.fullmatch(here):
            own = match[2] in (None, "self", str(os.getpid()))
            return (STREAMS[match[1]] if match[1] else int(match[3])) if own else None
        if not os.path.islink(here):
            return None
        here = os.path.normpath(os.path.join(os.path.dirname(here), os.readlink(here)))
    return None


@contextmanager
def _added(stream: int, target: Path) -> Iterator[Path]:
    """A file elsewhere whose content is written to a stream at the end: opening the stream by name would empty it."""
    handle, name = tempfile.mkstemp(suffix=target.suffix[:20])
    os.close(handle)
    try:
        yield Path(name)
        sys.stdout.flush()
        with open(name, "rb") as made, os.fdopen(os.dup(stream), "wb") as out:
            shutil.copyfileobj(made, out)
    finally:
        os.unlink(name)


def not_onto_itself(output: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Refuse an output that is one of the inputs, under whatever name, or lies inside a folder that is read.

    Raises:
        InputError: it is, or does.
    """
    target = Path(os.path.realpath(output))
    for given in inputs:
        there, to = remote_uri(given), remote_uri(output)
        if there is not None and to is not None and f"{to}/".startswith(f"{there}/"):
            raise InputError(f"{to} is or lies in {there}, which is read; name an output outside of it")
        source = Path(os.path.realpath(given))
        if not source.exists():
            continue
        same = source == target or (target.exists() and os.path.samefile(source, target))
        if same and stat.S_ISREG(source.stat().st_mode):
            raise InputError(f"{output} is what is read ({given}); name another output")
        if source.is_dir() and (same or source in target.parents):
            raise InputError(f"{output} lies in {given}, which is read; name an output outside of it")


def check_output(path: str | os.PathLike[str], *inputs: str | os.PathLike[str], endings: Sequence[str] = ()) -> None:
    """Refuse before the work what could not be written after it.

    Args:
        path: the output, a file.   inputs: what is read, as in `not_onto_itself`.   endings: the names that fit.

    Raises:
        InputError: as `write_whole` and `not_onto_itself`, or a name with another ending.
    """
    check_here(path)
    target = Path(path)
    if endings and target.suffix not in endings:
        raise InputError(f"{path} has to end in {' or '.join(endings)}")
    not_onto_itself(path, *inputs)
    with told(str(path)):
        if target.is_dir():
            raise InputError(f"{path} is a folder; name a file in it")
        if target.exists() and not target.is_file():
            return
        real = Path(os.path.realpath(target))
        above = next(folder for folder in real.parents if os.path.lexists(folder))
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK | os.X_OK) or (real.exists() and not os.access(real, os.W_OK)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_folder(folder: str | os.PathLike[str], written: Sequence[str], *inputs: str | os.PathLike[str]) -> None:
    """Refuse before the work a folder of a run in which it would write over what it reads; other inputs may lie there.

    Args:
        folder: of the run.   written: the names in it that the run writes.   inputs: as in `not_onto_itself`.

    Raises:
        InputError: it is a file, it lies in a folder that is read, or an input has or lies under one of those names.
    """
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    not_onto_itself(folder, *inputs)
    for name in written:
        target = place / name
        not_onto_itself(target, *inputs)
        for given in inputs:
            if Path(os.path.realpath(target)) in Path(os.path.realpath(given)).parents:
                raise InputError(
                    f"{given}, which is read, lies in {target}, which is written anew; name another folder"
                )


@contextmanager
def told(named: str) -> Iterator[None]:
    """Turn what the system says of an output into one sentence."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        name = str(error.filename or "")
        other = f" ({name})" if name and name != named and UNFINISHED not in name else ""
        raise InputError(f"can't write {named}: {error.strerror or error}{other}") from error
    except UnicodeEncodeError as error:  # the name of a file or folder, which Python passes on whatever its bytes are
        odd = brief(error.object[max(0, error.start - 20) : error.end + 10])
        raise InputError(f"can't write {named}: it would hold a name that is not UTF-8 ({odd}); rename that") from error
    except Exception as error:
        if "(os error " not in str(error):  # how safetensors and tokenizers, in Rust, repeat the system's words
            raise
        raise InputError(f"can't write {named}: {reason(error)}") from error


@contextmanager
def room(folder: object, kept: str = "everything up to here") -> Iterator[None]:
    """Say of a full disk what to do, around work in a folder that goes on when it is repeated.

    Args:
        folder: its path, or what stands for one elsewhere.   kept: what is not lost.

    Raises:
        InputError: the disk is full, or the folder can't be written.
    """
    try:
        with told(str(folder)):
            yield
    except InputError as error:
        cause = error.__cause__
        if _is_full(cause):
            raise InputError(
                f"no room to write to {folder}: the disk is full or a limit is reached; {kept} is kept, so make room"
                " and run the same command again"
            ) from cause
        raise


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards; where it fills the disk, the error says that nothing is kept.

    Raises:
        InputError: the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="qwen-scope-") as folder:
        try:
            yield Path(folder)
        except InputError as error:
            if _is_full(cause := error.__cause__):
                raise InputError(
                    f"no room to write what was read, which lies in {Path(folder).parent} while the command runs: the"
                    " disk is full or a limit is reached; make room there, or name another folder with TMPDIR=FOLDER,"
                    " and run the same command again"
                ) from cause
            raise


def _is_full(cause: BaseException | None) -> bool:
    return isinstance(cause, OSError) and (cause.errno in FULL or "No space left" in str(cause))


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the ones that were missing, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def digest_of(path: Any, *, sync: bool = False) -> str:
    """The SHA-256 of a file's bytes in hexadecimal digits.

    Args:
        path: of a file, or a `Remote`.   sync: put the file on the disk itself first.
    """
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk itself, where the system lets a folder be opened."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
