"""Where a model's files are: a folder, or a repository on the Hub through its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub import errors as hub

from qwen_scope.errors import FormatError, InputError, NotFoundError, foreign


def folder_of(name: str) -> str | None:
    """The folder a source names, or None where it can only be a hub id."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if name and path.exists():
        raise NotFoundError(f"{name!r} is a file; pass the folder that holds the model")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name or not name:
        raise NotFoundError(f"there is no folder {name!r}")
    return None


def read_config(name: str, place: str, revision: str | None) -> dict[str, Any]:
    path = Path(place, "config.json") if Path(place).is_dir() else Path(_fetch_config(place, revision))
    if not path.is_file():
        raise FormatError(f"the folder {name!r} has no config.json, so it holds no transformers model")
    with foreign(f"the config.json of {name!r} can't be read"):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise FormatError(f"the config.json of {name!r} names no model_type, so it is no transformers model")
    return config


def _fetch_config(repo: str, revision: str | None) -> str:
    """The path of the cached config.json, so that whatever is wrong with the repository shows at once."""
    try:
        if not constants.HF_HUB_OFFLINE and try_to_load_from_cache(repo, "config.json", revision=revision) is None:
            get_hf_file_metadata(hf_hub_url(repo, "config.json", revision=revision))  # fails without retrying
        return hf_hub_download(repo, "config.json", revision=revision)
    except hub.HFValidationError as error:
        raise NotFoundError(f"{repo!r} is neither a folder here nor a hub id (owner/name)") from error
    except hub.GatedRepoError as error:
        raise NotFoundError(
            f"{repo!r} is gated: ask for access on its page, then log in with 'hf auth login'"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise NotFoundError(f"{repo!r} has no revision {revision!r}") from error
    except hub.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{repo!r} is neither a folder here nor a repository on the Hub (a private one needs 'hf auth login')"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        why = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the Hub can't be reached"
        raise NotFoundError(f"{repo!r} is not in the local cache and {why}") from error
    except hub.EntryNotFoundError as error:
        raise FormatError(f"{repo!r} has no config.json, so it holds no transformers model") from error
    except hub.HfHubHTTPError as error:
        raise NotFoundError(f"the Hub did not give {repo!r}: {sentence(error)}") from error
    except hub.HTTPError as error:  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, by version
        raise NotFoundError(
            f"{repo!r} is not in the local cache and the Hub can't be reached: {sentence(error)}"
        ) from error


def known_type(name: str, config: dict[str, Any]) -> str:
    kind = config["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        hint = (
            "it needs code of its own, which is not run"
            if "auto_map" in config
            else f"transformers {transformers.__version__} does not know it; a newer transformers may"
        )
        raise InputError(f"{name!r} has the architecture {kind!r}: {hint}")
    return kind


def sentence(error: BaseException) -> str:
    """The first sentence of a longer message, on one line."""
    return " ".join(str(error).split(". ")[0].split()).rstrip(".") or type(error).__name__
