"""The windows of an extraction as a source of Ray Data: one task reads the corpus in its order, a window at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from qwen_scope.scope import Job

WINDOW = pa.schema([pa.field("number", pa.int64()), pa.field("window", pa.large_string())])


class Windows(Datasource):
    """One read task, on the machine of the driver, whose blocks are windows: documents are numbered in their order.

    Args:
        folder: the driver's working directory, which relative paths of the corpus start from.
    """

    def __init__(self, job: Job, folder: str) -> None:
        super().__init__()
        self.job, self.folder = job, folder

    @property
    def supports_distributed_reads(self) -> bool:
        """Files of the corpus may lie on the driver's machine alone."""
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known before the corpus is read."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """The one task."""
        return [ReadTask(partial(blocks, self.job, self.folder), BlockMetadata(None, None, None, None))]


def blocks(job: Job, folder: str) -> Iterator[pa.Table]:
    """Each window as a table of one row."""
    with chdir(folder):
        for number, window in job.windows():
            yield pa.Table.from_pydict({"number": [number], "window": [window]}, schema=WINDOW)
