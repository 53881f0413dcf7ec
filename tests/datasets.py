"""The folder of the real data sets, the marks of tests that need it, and standard streams with bytes."""

from __future__ import annotations

import io
import os

import pytest

FOLDER = os.environ.get("PYROFLOWS_DATA")
real_files = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="PYROFLOWS_DATA does not name the folder of the data"),
]


class Stream(io.StringIO):
    """Standard input or output with a buffer of bytes."""

    def __init__(self, data=b""):
        super().__init__()
        self.buffer = io.BytesIO(data)
