"""How fast this machine multiplies float32 matrices: the limit that prefill is measured against."""

from __future__ import annotations

import time

import torch

_SIZE = 2048  # rows and columns: far beyond the caches, where a library's blocking shows its best
_TIMES = 8


def matmul_flops(threads: int, *, size: int = _SIZE, times: int = _TIMES) -> float:
    """Floating point operations a second of `torch.mm` on [size, size] float32, at its best of `times`.

    A multiplication and an addition are two operations. `threads`: of this process from now on. Raises ValueError for
    numbers below 1.
    """
    if min(threads, size, times) < 1:
        raise ValueError(f"threads, size and times must be at least 1, got {threads}, {size}, {times}")
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(size, size, generator=generator) for _ in range(2))
    out = torch.mm(a, b)  # the library chooses its kernels
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
