"""`Progress`: how far work has come, told while it runs."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, str], None]
"""Called as `progress(stage, share, text)`: what is being done, its share done from 0 to 1, and a short text that
changes meanwhile. Each stage counts for itself; where its size is not known, its share stays 0 and the text gives the
count."""
