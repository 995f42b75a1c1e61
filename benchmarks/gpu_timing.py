"""Honest GPU timing: CUDA graphs, buffers rotated so that L2 is always cold, medians with spread."""

from __future__ import annotations

from collections.abc import Callable

import torch

COLD = 256 << 20  # rotate over at least this many bytes: five times the L2 of an H100


def copies(bytes_per_call: int) -> int:
    """How many independent inputs to rotate over so that none survives in L2 until its next turn."""
    return max(2, -(-COLD // max(1, bytes_per_call)))


def time_us(calls: list[Callable[[], object]], repeats: int = 15, least_ms: float = 2.0) -> tuple[float, float]:
    """(median, interquartile range) in microseconds of one call, over graph replays that run every call in turn."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            keep = [call() for call in calls]
        graph.replay()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        rounds = max(1, int(least_ms / max(begin.elapsed_time(end), 1e-3)))
        samples = []
        for _ in range(repeats):
            begin.record()
            for _ in range(rounds):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) * 1000 / rounds / len(calls))
    del keep, graph
    samples.sort()
    quarter = len(samples) // 4
    return samples[len(samples) // 2], samples[-1 - quarter] - samples[quarter]


def machine() -> dict:
    """The card and the software that produced a number."""
    import triton

    p = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    us, _ = time_us([lambda: target.copy_(source)] * 2)
    return {
        "gpu": p.name, "sms": p.multi_processor_count, "l2_mb": round(p.L2_cache_size / 2**20),
        "memory_gb": round(p.total_memory / 2**30), "copy_tb_s": round(2 * source.numel() / us / 1e6, 2),
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
    }
