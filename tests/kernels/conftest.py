"""Kernel tests: without CUDA the Triton kernels run in Triton's interpreter (float16 and float32, small shapes)."""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(__file__))  # the helpers beside the tests

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    import pytest

    if not CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
