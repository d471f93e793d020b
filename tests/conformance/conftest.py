"""Every conformance test runs on one thread: the problems are too small for two, and other test processes may be at work."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """Set inside the test, put back after it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def key_of_the_judge():
    """Workers inherit it; the judge is a server of the test's own."""
    before = os.environ.setdefault("OPENAI_API_KEY", "none")
    yield before
