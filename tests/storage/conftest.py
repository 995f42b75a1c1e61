"""Sample records and stores. The folder is no package, so that it never shadows the room it tests."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from storage import Store  # noqa: E402


def _token(i):
    return {
        "id": i,
        "text": f" tök{i}",
        "logprob": -0.1 * i,
        "entropy": 0.5,
        "step_ms": 1.25,
        "kv_bytes": 100 * i,
        "kept": float(i),
        "alternatives": [[i, f" tök{i}", 0.9], [i + 1, "<script>", 0.1]],
    }


def _variant(letter, spec, tokens):
    return {
        "letter": letter,
        "spec": spec,
        "title": spec.title(),
        "techniques": [{"name": "h2o", "params": {"budget": 0.25, "sinks": None}}],
        "text": "Ein Satz. 🙂\n\x00'; DROP TABLE runs; --",
        "token_ids": list(range(tokens)),
        "finish": "length",
        "error": None,
        "ttft_ms": 12.5,
        "tpot_ms": 1.5,
        "kv_bytes": 4000,
        "kv_bytes_dense": 16000,
        "slack_bytes": 0,
        "kept_fraction": 0.25,
        "read_fraction": None,
        "simulated": False,
        "saves": ["memory"],
        "samples": [],
        "kl_mean": 0.01,
        "top1_agreement": 0.98,
        "perplexity": 8.25,
        "first_divergence": None,
        "tokens": [_token(i) for i in range(tokens)],
        "fidelity": [
            {"kl": 0.01, "agree": True, "ref_prob": 0.5, "var_prob": 0.4, "top": [[1, "a", 0.5]]}
            for _ in range(tokens)
        ],
        "layers": [
            {"layer": i, "kv_bytes": 500, "bits": {"16": 4, "8": 0, "4": 2, "2": 0, "0": 3}} for i in range(3)
        ],
    }


def sample_record(run_id="20261124-105236-3fa9", tokens=4, specs=("dense", "h2o(budget=0.25)"), **changes):
    """A complete record that keeps to the contract."""
    record = {
        "schema": 1,
        "run_id": run_id,
        "name": "",
        "tags": ["lesson", "über"],
        "created": "2026-11-24T10:52:36Z",
        "status": "complete",
        "model": {
            "id": "SmolLM2-135M-Instruct",
            "source": "default",
            "revision": None,
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "layers": 30,
            "heads": 9,
            "kv_heads": 3,
            "head_dim": 64,
            "context": 8192,
            "vocab": 49152,
            "dtype": "float32",
            "weights": "int8",
            "device": "cpu",
            "sliding_window": None,
            "layer_types": ["full_attention"] * 30,
            "kv_bytes_per_token": 46080,
            "weights_kl": 0.004,
        },
        "device": "cpu",
        "environment": {"python": "3.11.7", "torch": "2.13.0", "threads": 2, "gpu": None},
        "settings": {
            "max_new_tokens": 64,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "seed": 0,
            "timing": "interleaved",
            "chat": False,
            "fidelity": True,
            "samples": 1,
        },
        "prompt": {"text": "Grüße an die Welt", "token_ids": [1, 2, 3], "tokens": ["Gr", "üße", " an"]},
        "variants": [_variant("ABCD"[i], spec, tokens) for i, spec in enumerate(specs)],
    }
    return {**record, **changes}


def sample_arrays():
    """Arrays as they travel beside a record."""
    random = np.random.default_rng(0)
    return {
        "cache/A/bits": np.full((3, 2, 7), 16, np.uint8),
        "cache/A/death": np.full((3, 2, 7), 2**31 - 1, np.int32),
        "qk/A/0/q": random.normal(size=(9, 7, 64)).astype(np.float16),
        "qk/A/0/meta": np.array([0.125, 0.0, 0.0]),
    }


def run_python(code, *arguments, **options):
    """A Python process that has this repository on its path."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def start_python(code, *arguments):
    """The same, still running, with its output to read from. The caller ends it."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="session")
def make():
    return sample_record


@pytest.fixture(scope="session")
def arrays():
    return sample_arrays()


@pytest.fixture(scope="session")
def python():
    return run_python


@pytest.fixture
def holder():
    """Starts `code` in another process, waits for its first line, and kills it in the end."""
    started = []

    def start(code, *arguments):
        process = start_python(code, *arguments)
        started.append(process)
        process.first_line = process.stdout.readline().strip()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "runs.duckdb"


@pytest.fixture
def store(path):
    with Store.open(path) as opened:
        yield opened
