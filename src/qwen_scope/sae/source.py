"""Where SAEs lie: a folder, one file, or a repository on the Hub. Names first, then only the files that are needed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import final

from qwen_scope.errors import InputError, NotFoundError, QwenScopeError, nearest
from qwen_scope.files import Remote, place

from . import catalog
from .catalog import Group
from .formats.hooks import layer_in

REPO_ID = re.compile(r"[\w.\-]+/[\w.\-]+")
OUR_REPO = re.compile(r"SAE-Res-.+-W[0-9]+K-L0_[0-9]+")


class Source(ABC):
    """A place that holds SAEs.

    Attributes:
        where: how messages name it.   label: the name of its folder or repository.
        group: the group its files belong to unless they say otherwise.
        listed: the catalog's row for it, or None.   only: the one file that was named, or None.
    """

    where: str
    group: str
    label: str
    listed: Group | None
    only: str | None

    @abstractmethod
    def names(self) -> Sequence[str]:
        """The names of its files, relative to it."""

    @abstractmethod
    def fetch(self, name: str) -> Path:
        """A local path of the file `name`; raises NotFoundError if it can't be had."""

    def fetch_optional(self, name: str) -> Path | None:
        """A local path of the file `name`, or None if the place has no such file."""
        return self.fetch(name)


@final
class FolderSource(Source):
    """A folder on this machine, or one file of it."""

    def __init__(self, folder: Path, only: str | None = None, listed: Group | None = None) -> None:
        self.folder = folder
        self.where = str(folder / only if only else folder)
        self.label = folder.resolve().name
        # A folder such as `layers.12` is one SAE of the group whose name stands above it.
        self.group = self.label if layer_in(self.label) is None else folder.resolve().parent.name
        self.group = listed.name if listed else self.group
        self.listed, self.only = listed, only

    def names(self) -> Sequence[str]:
        # Repositories of other tools hold one folder per SAE, some with two levels above it.
        levels = ("*",) if self.only else ("*", "*/*", "*/*/*", "*/*/*/*")
        found = (path for level in levels for path in self.folder.glob(level))
        return [path.relative_to(self.folder).as_posix() for path in found if path.is_file()]

    def fetch(self, name: str) -> Path:
        return self.folder / name


@final
class RemoteSource(Source):
    """A folder at a URI, or one file of it; files are copied to a cache on this machine, since weights are mapped."""

    def __init__(self, folder: Remote, only: str | None = None) -> None:
        self.folder, self.only, self.listed = folder, only, None
        self.where, self.label = str(folder / only if only else folder), folder.name
        self.group = self.label if layer_in(self.label) is None else folder.parent.name

    def names(self) -> Sequence[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob()]

    def fetch(self, name: str) -> Path:
        return (self.folder / name).fetched()


@final
class HubSource(Source):
    """A repository on the Hub, read through huggingface_hub and its cache."""

    def __init__(self, repo: str, revision: str | None, cache_dir: str | Path | None, listed: Group | None) -> None:
        self.repo, self.revision, self.cache_dir = repo, revision, cache_dir
        self.where, self.group, self.label = repo, repo.rpartition("/")[2], repo.rpartition("/")[2]
        self.group = listed.name if listed else self.group
        self.listed, self.only = listed, None

    def names(self) -> Sequence[str]:
        known = [] if self.listed is None else self.listed.filenames()
        if self.listed and self.listed.complete and known:
            return known
        folder = self.listed.folder_on_hub if self.listed else ""
        return [name for name in self._asked() if name.startswith(f"{folder}/")] if folder else self._asked()

    def _asked(self) -> Sequence[str]:
        """The names in the repository; without the Hub those in the cache."""
        from huggingface_hub import HfApi

        from .hub import Unreachable, cached_names, explained

        try:
            with explained(self.repo, self.revision):
                return HfApi().list_repo_files(self.repo, revision=self.revision)
        except Unreachable:
            if found := cached_names(self.repo, self.revision, self.cache_dir):
                self.where = f"the cached part of {self.repo}"
                return found
            raise

    def fetch(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        from .hub import explained, probe

        with explained(self.repo, self.revision, name):
            probe(self.repo, name, self.revision, self.cache_dir)
            return Path(hf_hub_download(self.repo, name, revision=self.revision, cache_dir=self.cache_dir))

    def fetch_optional(self, name: str) -> Path | None:
        try:
            return self.fetch(name)
        except NotFoundError as error:
            from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

            # The catalog lists a config for every group; where there is none, the group's name says k.
            absent = isinstance(error.__cause__, RemoteEntryNotFoundError)
            if self.listed and absent and not isinstance(error.__cause__, LocalEntryNotFoundError):
                return None
            raise


def resolve(source: str | Path | Group, revision: str | None = None, cache_dir: str | Path | None = None) -> Source:
    """The place that `source` means: a bare name of the catalog, an existing path, a repository id.

    A folder of the same name as a group is meant only as a `Path` or with a slash in it, such as `./lab`.

    Raises:
        NotFoundError: none of the three.   InputError: a revision for something that has none.
    """
    group = source if isinstance(source, Group) else None
    if isinstance(source, str) and "/" not in source:
        group = catalog.lookup(source)
    path = None if isinstance(source, Group) or group is not None else place(source)
    if isinstance(path, Remote):
        _no_revision(revision, path)
        if path.is_file():
            return RemoteSource(path.parent, path.name)
        if path.is_dir():
            return RemoteSource(path)
        raise NotFoundError(f"there is no file or folder {path}")
    if path is not None and path.exists():
        _no_revision(revision, path)
        return FolderSource(path) if path.is_dir() else FolderSource(path.parent, path.name)
    if isinstance(source, str):
        group = group or catalog.lookup(source)
    if group is None:
        assert not isinstance(source, Group), "a group was found or given"
        return HubSource(_repo_id(source), revision, cache_dir, None)
    if group.folder is not None:
        _no_revision(revision, group.folder)
        return FolderSource(group.folder, listed=group)
    assert group.repo is not None, "a group is on the Hub or in the package"
    return HubSource(group.repo, revision, cache_dir, group)


def _no_revision(revision: str | None, path: Path | Remote) -> None:
    if revision is not None:
        raise InputError(f"revision={revision!r} was asked for, but {path} is no repository and has no revisions")


def _repo_id(source: str | Path) -> str:
    """The repository id that a string is, `Qwen/` put before a released-looking bare name; else NotFoundError."""
    name = str(source)
    if isinstance(source, str) and OUR_REPO.fullmatch(name):
        return f"Qwen/{name}"
    if isinstance(source, str) and REPO_ID.fullmatch(name) and not name.startswith("."):
        return name
    raise _unknown(source)


def _unknown(source: str | Path) -> QwenScopeError:
    if isinstance(source, Path) or "/" in source or source.endswith((".pt", ".safetensors")):
        return NotFoundError(f"there is no file or folder {source}")
    try:
        catalog.find(source)
    except NotFoundError as error:
        return error
    names = [group.name for group in catalog.groups()]
    return NotFoundError(f"there is no folder, file or group {source!r}; {nearest(source, names)}")
