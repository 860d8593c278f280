"""An S3 server on this machine, moto's, with one empty bucket: what a store is written to as to any other bucket."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

BUCKET = "bucket"


@contextmanager
def s3() -> Iterator[str]:
    """The address of a bucket, while the environment says where its server is and how to sign in."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would tell of every request
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    place = {
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with (
            patch.dict(os.environ, place),
            patch.dict(fsspec.config.conf, {"s3": {"endpoint_url": place["FSSPEC_S3_ENDPOINT_URL"]}}),
        ):
            fsspec.filesystem("s3").mkdir(BUCKET)
            yield f"s3://{BUCKET}"
    finally:
        server.stop()
