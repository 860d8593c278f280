"""What can go wrong on the way to the Hub, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub import get_hf_file_metadata, hf_hub_url, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.constants import is_offline_mode

from qwen_scope.errors import InputError, NotFoundError

# The root of everything the HTTP library may raise; which library that is depends on the version of huggingface_hub.
HTTP_ERROR: type[Exception] = hub.HfHubHTTPError.__bases__[0]


class Unreachable(NotFoundError):
    """The Hub could not be asked, or may not be, and the cache does not know."""


@contextmanager
def explained(repo: str, revision: str | None, name: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into `NotFoundError` or `InputError`."""
    at = f"{repo} at revision {revision!r}" if revision else repo
    what = f"{name} of {at}" if name else f"the file list of {at}"
    try:
        yield
    except hub.GatedRepoError as error:
        raise NotFoundError(f"{repo} is gated: ask for access on its page, then log in with `hf auth login`") from error
    except hub.RepositoryNotFoundError as error:
        raise NotFoundError(f"the Hub has no repository {repo}, or it is private and you are not logged in") from error
    except hub.RevisionNotFoundError as error:
        raise NotFoundError(f"{repo} has no revision {revision!r}") from error
    except hub.HFValidationError as error:
        raise InputError(f"{repo!r} is not a repository id of the form owner/name") from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub can't be reached"
        raise Unreachable(f"{what} is not in the local cache and {reason}") from error
    except hub.EntryNotFoundError as error:
        raise NotFoundError(f"{at} has no file {name}") from error
    except hub.HfHubHTTPError as error:
        raise Unreachable(f"{what} could not be fetched from the Hub: {type(error).__name__}") from error
    except HTTP_ERROR as error:
        raise Unreachable(f"{what} is not in the local cache and the Hub can't be reached") from error


def probe(repo: str, name: str, revision: str | None, cache_dir: str | Path | None) -> None:
    """Ask for a file that the cache lacks once, so that a missing network shows before minutes of retries."""
    if not is_offline_mode() and try_to_load_from_cache(repo, name, revision=revision, cache_dir=cache_dir) is None:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))


def cached_names(repo: str, revision: str | None, cache_dir: str | Path | None) -> list[str]:
    """The files of a repository that the cache holds for this revision (`main` by default), without asking the Hub."""
    try:
        cache = scan_cache_dir(cache_dir)
    except hub.CacheNotFound:
        return []
    wanted = revision or "main"
    for cached in cache.repos:
        if cached.repo_id == repo and cached.repo_type == "model":
            for snapshot in cached.revisions:
                if wanted in snapshot.refs or snapshot.commit_hash.startswith(wanted):
                    root = snapshot.snapshot_path
                    return [file.file_path.relative_to(root).as_posix() for file in snapshot.files]
    return []
