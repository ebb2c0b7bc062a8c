"""The benchmark's cases under pytest-benchmark: `pytest tests/bench --benchmark-enable`. Without: once, as tests.

`--benchmark-group-by=param:op,param:mode` puts providers side by side, `--benchmark-compare` two runs.
"""

import pytest
import torch

from fastattn.bench.cases.module import workload_of
from fastattn.bench.cases.operations import OPS, bench_cases
from fastattn.bench.measure.providers.table import provider

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"q_len": [256], "num_heads": [4], "head_dim": [64]} if DEVICE.type == "cpu" else {"q_len": [4096]}


PEER = {"module": "mha"}
ROWS = [(op, mode, name) for op in OPS for mode in OPS[op].modes for name in ("fastattn", PEER.get(op, "sdpa"))]


@pytest.mark.parametrize("op, mode, name", ROWS)
def test_case(benchmark, op, mode, name):
    [case] = bench_cases(DEVICE.type, ops=[op], **SIZES)
    workload = workload_of(case, DEVICE)
    who = provider(name)
    reason = who.why_not(workload, mode)
    if reason:
        pytest.skip(reason)
    call = workload.call(mode, who.make(workload, mode))

    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(case=case.name, useful_flops=workload.flops(mode, useful=True))
    benchmark(run)
