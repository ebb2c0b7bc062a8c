"""A yardstick for tiles on a CPU: the rate of torch's own tile product (`at::native::cpublas::brgemm`, which its fused
attention calls), by one thread, on a tile of that kernel's scores.

The symbol is exported but promised nowhere, so it is called in a child process: a torch that has changed it costs
nothing but the figure.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

SYMBOLS = {"bf16": "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"}
ROWS, COLUMNS, DEPTH = 256, 512, 64
"""Queries and keys of the tile, and the head's width."""

ROUNDS, CALLS = 20, 20
SECONDS = 60.0


def brgemm_tflops() -> dict[str, float]:
    """TFLOP/s by dtype, measured in a child; empty where that does not come to an end."""
    command = [sys.executable, "-m", "fastattn.bench.measure.brgemm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def measured(dtype: str) -> float | None:
    """TFLOP/s of one thread, its best round; None without the symbol. ArithmeticError for a wrong product."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    product = getattr(library, SYMBOLS[dtype], None)
    if product is None:
        return None
    # rows, columns, depth, the three leading dimensions, whether to add, A, B, C, whether B is packed by pairs of rows
    product.argtypes = [ctypes.c_int64] * 6 + [ctypes.c_bool] + [ctypes.c_void_p] * 3 + [ctypes.c_bool]
    product.restype = None
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=generator).bfloat16() for shape in ((ROWS, DEPTH), (DEPTH, COLUMNS)))
    packed = right.view(DEPTH // 2, 2, COLUMNS).transpose(1, 2).contiguous()
    out = torch.zeros(ROWS, COLUMNS)
    sizes = (ROWS, COLUMNS, DEPTH, DEPTH, COLUMNS, COLUMNS)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            product(*sizes, False, left.data_ptr(), packed.data_ptr(), out.data_ptr(), True)
        best = min(best, (time.perf_counter() - start) / CALLS)
    if not torch.allclose(out, left.float() @ right.float(), atol=1e-3):
        raise ArithmeticError("torch's brgemm gave another product than its matmul")
    return 2 * ROWS * COLUMNS * DEPTH / best / 1e12


def main() -> int:
    found = {dtype: measured(dtype) for dtype in SYMBOLS}
    print(json.dumps({dtype: rate for dtype, rate in found.items() if rate is not None}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
