"""Kernel tests: without CUDA the Triton kernels run in Triton's interpreter (float16 and float32, small shapes)."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))  # the helpers beside the tests

if importlib.util.find_spec("hypothesis") is None:  # a GPU machine may have torch and triton only
    collect_ignore = [f.name for f in Path(__file__).parent.glob("test_*.py") if "from hypothesis" in f.read_text()]

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Where triton is missing (macOS, Windows), a test is skipped when it asks for the Triton path by name, and not before:
    what it says of the torch path until then is checked. "auto" never asks, so that no fault of the torch path hides here."""
    from kernels.backend import has_triton

    try:
        return (yield)
    except ValueError as problem:
        if has_triton() or "the Triton path was asked for" not in str(problem):
            raise
    pytest.skip("triton is not installed")
