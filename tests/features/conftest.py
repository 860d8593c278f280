"""The lab's store, open or as a folder, for tests that only read it."""

from __future__ import annotations

from lab_store import a_folder as a_folder
from lab_store import a_store as a_store
