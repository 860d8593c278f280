"""Files and folders at URIs, through fsspec: `place` gives what readers take in place of a path on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Any, final
from urllib.parse import unquote, urlsplit

from qwen_scope.errors import InputError, NotFoundError, QwenScopeError, nearest, reason

from .uri import remote_uri
from .whole import write_whole

# What a protocol takes beside fsspec, which names the package itself where it is missing.
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
}

# How a bucket on S3 is asked for the first time: its client would try an address that nobody answers at for half a
# minute. Once it has answered, the client's own patience holds.
FIRST_ASKED = {"retries": {"total_max_attempts": 2}, "connect_timeout": 3}
ANSWERED: set[tuple[str | None, str]] = set()
"""Endpoints and buckets that have."""

# Where a folder is no more than the beginning of names.
BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "r2", "hf", "memory")


def place(source: str | os.PathLike[str] | Remote) -> Path | Remote:
    """The path of a source on this machine, also named by a `file:` URI, or what stands for one elsewhere.

    Raises:
        NotFoundError: there is no such protocol.
    """
    if isinstance(source, Remote):
        return source
    text = os.fspath(source)
    if isinstance(text, str) and text.startswith("file:/"):
        return Path(unquote(urlsplit(text).path))
    found = remote_uri(source)
    return Path(source) if found is None else Remote(found)


@dataclass(frozen=True)
class Size:
    """What is known of a file without reading it.

    Attributes:
        st_size: its bytes.
    """

    st_size: int


@final
class Remote:
    """A file or folder at a URI, with what readers use of `Path`; nothing is asked before it is used.

    Args:
        uri: with two slashes after the protocol.

    Raises:
        NotFoundError: fsspec knows no such protocol.
    """

    def __init__(self, uri: str) -> None:
        from fsspec import available_protocols

        self.uri, self.protocol = uri, uri.partition("://")[0]
        if self.protocol not in available_protocols():
            raise NotFoundError(f"{uri} is of no known protocol; {nearest(self.protocol, available_protocols())}")
        self.path = PurePosixPath(uri.partition("://")[2])

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"Remote({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __lt__(self, other: Remote) -> bool:
        return self.uri < other.uri

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.uri}/{name}")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def parent(self) -> Remote:
        return Remote(f"{self.protocol}://{self.path.parent.as_posix()}")

    def with_suffix(self, suffix: str) -> Remote:
        """The same with another ending."""
        return Remote(f"{self.protocol}://{self.path.with_suffix(suffix).as_posix()}")

    def relative_to(self, other: Remote) -> PurePosixPath:
        """The way from a folder to this."""
        return self.path.relative_to(other.path)

    def expanduser(self) -> Remote:
        """Itself."""
        return self

    def resolve(self) -> Remote:
        """Itself: a URI is whole."""
        return self

    @property
    def filesystem(self) -> Any:
        """The fsspec file system that reads it; raises as `answering`."""
        return self._located()[0]

    @property
    def whole(self) -> str:
        """The URI as the file system itself writes it; raises as `answering`."""
        filesystem, key = self._located()
        return filesystem.unstrip_protocol(key)

    def _located(self) -> tuple[Any, str]:
        """The file system and the name in it."""
        from fsspec.core import url_to_fs

        with answering(self):
            filesystem, key = url_to_fs(self.uri)
            if self.protocol in ("s3", "s3a"):
                asked = (filesystem.endpoint_url, self.path.parts[0])
                if asked not in ANSWERED:
                    knock(filesystem, asked[1])
                    ANSWERED.add(asked)
            return filesystem, key

    def exists(self) -> bool:
        """Whether anything is there; raises as `answering`."""
        with answering(self):
            filesystem, key = self._located()
            return filesystem.exists(key)

    def is_file(self) -> bool:
        """Whether a file is there; raises as `answering`."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether a folder is there, that is files whose names begin with it; raises as `answering`."""
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        with answering(self):
            filesystem, key = self._located()
            try:
                return filesystem.info(key)["type"]
            except FileNotFoundError:
                return None

    def stat(self) -> Size:
        """Its size; raises as `answering`."""
        with answering(self):
            filesystem, key = self._located()
            return Size(int(filesystem.info(key)["size"]))

    def rglob(self, pattern: str = "*") -> Iterator[Remote]:
        """All files below it; raises as `answering`."""
        assert pattern == "*", "all files or none"
        with answering(self):
            filesystem, key = self._located()
            below = [name[len(key) :].lstrip("/") for name in filesystem.find(key)]
        yield from (self / name for name in below)

    def open(self, mode: str = "rb", **_: Any) -> IO[bytes]:
        """The file, to be read; raises as `answering`."""
        assert mode == "rb", "what is elsewhere is read"
        with answering(self):
            filesystem, key = self._located()
            return filesystem.open(key, mode)

    def read_bytes(self) -> bytes:
        """All of it; raises as `answering`."""
        with answering(self):
            filesystem, key = self._located()
            return filesystem.cat_file(key)

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of it as a text; raises as `answering`, and UnicodeDecodeError."""
        return self.read_bytes().decode(encoding)

    def absolute(self) -> Remote:
        """Itself."""
        return self

    def refresh(self) -> None:
        """Forget what was listed: other processes write there."""
        self.filesystem.invalidate_cache()

    def mkdir(self, **_: Any) -> None:
        """Nothing: a folder is the beginning of names, and where it is more it is made for its first file."""

    def glob(self, pattern: str) -> list[Remote]:
        """What lies directly below it under a name of this pattern, as it is now; raises as `answering`."""
        with answering(self):
            filesystem, key = self._located()
            filesystem.invalidate_cache()
            try:
                found = filesystem.ls(key, detail=False)
            except FileNotFoundError:
                return []
        names = sorted({one.rstrip("/").rpartition("/")[2] for one in found if one.rstrip("/") != key})
        return [self / name for name in names if fnmatchcase(name, pattern)]

    def iterdir(self) -> list[Remote]:
        """What lies directly below it; raises as `answering`."""
        return self.glob("*")

    def write_bytes(self, content: bytes) -> None:
        """Put all of it there at once: readers see the file before, or this one; raises as `answering`."""
        with answering(self, "written"):
            self._begun().pipe_file(self._located()[1], content)

    def write_text(self, text: str) -> None:
        """As `write_bytes`, in UTF-8."""
        self.write_bytes(text.encode("utf-8"))

    def put(self, file: Path) -> None:
        """The content of a file of this machine, as `write_bytes`."""
        with answering(self, "written"):
            self._begun().put_file(str(file), self._located()[1])

    def _begun(self) -> Any:
        """The file system, with the folders above that it keeps; a bucket is never made."""
        filesystem, key = self._located()
        if self.protocol not in BUCKETS:
            filesystem.makedirs(filesystem._parent(key), exist_ok=True)
        return filesystem

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file; raises as `answering`."""
        with answering(self, "written"), suppress(*([FileNotFoundError] if missing_ok else [])):
            filesystem, key = self._located()
            filesystem.rm_file(key)

    def rmtree(self) -> None:
        """Remove everything below it, where anything is; raises as `answering`."""
        with answering(self, "written"):
            filesystem, key = self._located()
            filesystem.invalidate_cache()
            if filesystem.exists(key):
                filesystem.rm(key, recursive=True)

    def fetched(self) -> Path:
        """A copy on this machine, for a file that has to be memory-mapped; one that is there is taken again.

        It lies in the cache of Hugging Face under the digest of its URI and size.

        Raises:
            InputError: no room for it.   QwenScopeError: as `answering`.
        """
        from huggingface_hub.constants import HF_HOME

        with answering(self):
            filesystem, key = self._located()
            info = filesystem.info(key)
        told = "\n".join(str(info.get(name)) for name in ("name", "size", "ETag", "mtime", "LastModified", "created"))
        digest = hashlib.sha256(f"{self.uri}\n{told}".encode()).hexdigest()[:32]
        copy = Path(HF_HOME) / "qwen-scope" / digest / self.name
        if not copy.is_file():
            with write_whole(copy) as part, self.open() as source, part.open("wb") as out:
                shutil.copyfileobj(source, out, 2**22)
        return copy


def knock(filesystem: Any, bucket: str) -> None:
    """Raise what botocore does where nobody answers for a bucket, after two tries; any answer will do."""
    from botocore.exceptions import BotoCoreError
    from botocore.exceptions import ConnectionError as Unreachable

    own = {**(filesystem.config_kwargs or {}), **FIRST_ASKED}
    impatient = type(filesystem)(**{**filesystem.storage_options, "config_kwargs": own})
    try:
        impatient.info(bucket)
    except Unreachable:
        raise
    except (OSError, BotoCoreError):  # a refusal is an answer, and told by whoever asks for more
        return


@contextmanager
def answering(at: Remote, done: str = "reached") -> Iterator[None]:
    """A boundary around a call to a place elsewhere: whatever it answers instead becomes one sentence.

    Args:
        done: what is being done with it: it is `reached` or `written`.

    Raises:
        NotFoundError: nothing is there, or the place can't be reached.
        InputError: it wants other credentials, or it can't be written.
    """
    try:
        yield
    except (QwenScopeError, BrokenPipeError):
        raise
    except FileNotFoundError as error:
        if done == "written":
            raise NotFoundError(
                f"{at} can't be written: there is no bucket or folder above it; make that first"
            ) from error
        raise NotFoundError(f"there is no file, folder or bucket {at}") from error
    except NotImplementedError as error:
        raise InputError(f"{at} can't be {done}: what lies at {at.protocol}:// is only read") from error
    except ImportError as error:  # fsspec says which package is missing
        raise NotFoundError(f"{at} can't be {done}: {reason(error)}") from error
    except Exception as error:
        said, kind = reason(error), type(error).__name__
        if isinstance(error, PermissionError) or "Credentials" in kind or "Forbidden" in said:
            names = CREDENTIALS.get(at.protocol, "those of its protocol")
            raise InputError(f"{at} asks for credentials ({said}); set {names}") from error
        raise NotFoundError(f"{at} can't be {done}: {said}; check the address and the network") from error
