"""The matrix module by name, and one worker a library for a whole module of tests."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch


def sibling(name: str):
    """A module of this folder (tests are collected without packages)."""
    full = f"saehub_conversion_{name}"
    if full not in sys.modules:
        spec = spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        sys.modules[full] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


@pytest.fixture(scope="session")
def matrix():
    return sibling("matrix")


@pytest.fixture(scope="session")
def equations():
    return sibling("equations")


@pytest.fixture(scope="module")
def invoke(matrix):
    """Exporters' methods in workers, one a library, that live as long as the module."""
    with matrix.Workers() as workers:
        yield workers


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems: one thread, put back after the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
