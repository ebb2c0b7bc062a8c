"""Candidate rows of the tile table, timed on the device at hand: what `make gpu-tune` runs as a child.

    python -m fastattn.kernels.host.tune '{"seconds": 300}'

A candidate stands in for one kernel's row, is compiled and run, its results are held against those of the row in the
table, then both are timed. One JSON object a line: the problem, the candidate as a row to paste, its milliseconds
beside the table's, or why there are none.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from fastattn.kernels.host import launch, tile_table
from fastattn.kernels.host.tile_table import TileConfig, pick, shared_limit
from fastattn.masks import Causal, Full
from fastattn.spec import AttnInputs, AttnSpec

MASKS = {"full": Full, "causal": Causal}
PROBLEMS = tuple(itertools.product(("fwd", "dkv", "dq"), (128, 64), ("causal", "full")))
"""Kernel, head_dim and mask, the most telling first."""
LENGTHS = {"cuda": (8192, 2), "cpu": (48, 1)}
"""Tokens and batch; WIDTH numbers a token."""
WIDTH = {"cuda": 2048, "cpu": 128}
CLOSE = 2e-2
"""Relative distance of a candidate's result from the table's: another order of sums, rounded to bf16."""
WARM_MS, TIMED_MS = 20, 60


def candidates(row: TileConfig, head_dim: int) -> list[TileConfig]:
    """Rows beside `row` whose tiles and their stages fit the shared memory. Pure."""
    heights, widths = ((32, 64, 80), (64, 128)) if row.kernel == "dkv" else ((64, 128), (32, 64, 128))
    found = []
    for block_m, block_n, warps, stages, persistent in itertools.product(
        heights, widths, (4, 8), (2, 3, 4), sorted({False, row.persistent})
    ):
        power = block_m & (block_m - 1) == 0
        own, walked = (block_n, block_m) if row.kernel == "dkv" else (block_m, block_n)
        needed = 2 * 2 * head_dim * (own + stages * walked)
        if power and needed <= shared_limit(row, row.target):
            tiles = {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages}
            found.append(dataclasses.replace(row, **tiles, persistent=persistent))
    return [each for each in found if each != row]


@contextlib.contextmanager
def standing_in(row: TileConfig) -> Iterator[None]:
    """The table with this row before all others."""
    before = tile_table.TABLE
    tile_table.TABLE = (dataclasses.replace(row, load=tile_table.LIGHT), *before)
    tile_table._row.cache_clear()
    try:
        yield
    finally:
        tile_table.TABLE = before
        tile_table._row.cache_clear()


class Bench:
    """One problem on a device: a kernel's launch, alone, and what it writes."""

    def __init__(self, kernel: str, head_dim: int, mask: str, device: torch.device) -> None:
        self.kernel, self.target = kernel, launch.target_for(device)
        length, batch = LENGTHS[device.type]
        heads = max(1, WIDTH[device.type] // head_dim)
        make = lambda: torch.randn(batch, heads, length, head_dim, device=device).to(torch.bfloat16)
        self.inputs = AttnInputs(make(), make(), make())
        self.spec = AttnSpec.of(self.inputs, mask=MASKS[mask]())
        self.out, self.lse = self.spec.empty_out(self.inputs.query), self.spec.empty_lse(self.inputs.query)
        self.d_out = make()
        self.grads = [torch.empty_like(each) for each in self.inputs[:3]]
        terms = launch.empty_terms(self.spec, self.lse)
        self.tensors = launch.Backward(self.out, self.lse, self.d_out, None, *terms, *self.grads, None, None)
        for each in self._passes():
            each.run()

    def _passes(self) -> list[launch.Launch]:
        forward = launch.forward(self.spec, self.inputs, self.out, self.lse, self.target)
        return [*forward, *launch.backward(self.spec, self.inputs, self.tensors, self.target)]

    def flops(self) -> int:
        """Useful ones: two products of the forward, three of dq, four of dkv."""
        return self.spec.flops("fwd", useful=True) * {"fwd": 2, "dq": 3, "dkv": 4}[self.kernel] // 2

    def ready(self) -> tuple[launch.Launch, list[torch.Tensor]]:
        """The launch under the table as it stands, and the tensors it writes."""
        own = next(each for each in self._passes() if each.row.kernel == self.kernel)
        return own, {"fwd": [self.out], "dq": self.grads[:1], "dkv": self.grads[1:]}[self.kernel]


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """The median of many calls, the cache flushed before each (triton.testing.do_bench); one call on a CPU."""
    if device.type == "cuda":
        return triton.testing.do_bench(run, warmup=WARM_MS, rep=TIMED_MS, return_mode="median")
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def tune(
    device: torch.device, problems: tuple[tuple[str, int, str], ...] = PROBLEMS, clock: Callable = milliseconds
) -> Iterator[dict[str, Any]]:
    """A line for each candidate of each problem, fitting or not."""
    for kernel, head_dim, mask in problems:
        bench = Bench(kernel, head_dim, mask, device)
        row = pick(bench.spec, kernel, bench.target)
        base, results = bench.ready()
        base.run()
        right = [each.float() for each in results]
        base_ms = clock(base.run, device)
        words = {"kernel": kernel, "head_dim": head_dim, "mask": mask, "table_ms": base_ms, "table": _words(row)}
        yield words | {"row": _words(row), "ms": base_ms, "tflops": bench.flops() / (base_ms * 1e9), "reason": None}
        for each in candidates(row, head_dim):
            line = words | {"row": _words(each), "ms": None, "tflops": None, "reason": None}
            try:
                with standing_in(each):
                    own, results = bench.ready()
                for result in results:
                    result.fill_(float("nan"))
                own.run()
                if not all(_close(result, known) for result, known in zip(results, right, strict=True)):
                    line["reason"] = "another result"
                else:
                    line["ms"] = clock(own.run, device)
                    line["tflops"] = bench.flops() / (line["ms"] * 1e9)
            except Exception as failure:  # what the compiler or the device refuses is a figure, too
                line["reason"] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
            yield line


def _close(result: torch.Tensor, known: torch.Tensor) -> bool:
    return bool((result.float() - known).norm() <= CLOSE * known.norm())


def _words(row: TileConfig) -> str:
    """As it stands in the table."""
    size = f"{row.head_dim}, {row.bits}, {row.block_m}, {row.block_n}, {row.num_warps}, {row.num_stages}"
    flags = (", descriptors=True" if row.descriptors else "") + (", persistent=True" if row.persistent else "")
    load = f", load={row.load}" if row.load else ""
    return f'TileConfig("{row.target}", "{row.kernel}", {size}{flags}{load})'


def main(task: str) -> int:
    """Until the task's seconds are over."""
    given = json.loads(task)
    until = time.monotonic() + given["seconds"]
    device = torch.device(given["device"])
    for line in tune(device):
        print(json.dumps(line), flush=True)
        if time.monotonic() > until:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
