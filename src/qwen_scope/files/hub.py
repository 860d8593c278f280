"""Sending a folder to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from qwen_scope.errors import InputError, foreign


def push_folder(
    folder: Path,
    repo: str,
    kind: Literal["model", "dataset"],
    message: str,
    *,
    private: bool = False,
    card: str | None = None,
) -> str:
    """Send the files of a folder to a repository of the Hub, which is made where there is none; the commit's address.

    The token is the one of `hf auth login`, or of HF_TOKEN. Files that the repository has beside stay.

    Args:
        repo: `owner/name`.
        card: the text of `README.md`, where the folder has none of its own.

    Raises:
        InputError: a name that is no repository's, no token, no right to write there, or a Hub that refuses.
    """
    owner, slash, name = repo.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise InputError(f"a repository of the Hub is OWNER/NAME, not {repo!r:.80}")
    with foreign(f"{repo} can't be written", InputError, "log in with: hf auth login"):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path for path in paths if not path.name.startswith(".")}
        adds = [CommitOperationAdd(at, path) for at, path in files.items()]
        if card is not None and "README.md" not in files:
            adds.append(CommitOperationAdd("README.md", card.encode()))
        return str(api.create_commit(repo, adds, commit_message=message, repo_type=kind).commit_url)


def card_text(title: str, tags: list[str], parts: list[str], base_model: str | None = None) -> str:
    """A card for the Hub: what its search reads, a heading, and paragraphs."""
    head = ["---", "library_name: qwen-scope", "tags:", *(f"- {tag}" for tag in tags)]
    if base_model is not None and base_model.count("/") == 1 and not base_model.startswith(("/", ".")):
        head.append(f"base_model: {base_model}")
    return "\n".join([*head, "---", "", f"# {title}", "", "\n\n".join(parts), ""])


def card_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for a card."""
    head, *lines = (f"| {' | '.join(map(str, line))} |" for line in (columns, *rows))
    return "\n".join([head, f"|{'---|' * len(columns)}", *lines])
