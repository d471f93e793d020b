"""Every conformance test runs on one thread: the problems are too small for two, and other test processes may be at work."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """Set inside the test, put back after it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
