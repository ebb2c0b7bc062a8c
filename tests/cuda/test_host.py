"""The host's part of a call: what it costs, what it may not do while a graph is captured, what its errors say."""

import json
import re
from pathlib import Path

import pytest
import torch

from fastattn import BackendUnavailable, attention
from fastattn.backends import cuda
from fastattn.building import compiler, cuda_library, nvcc
from fastattn.masks import Causal
from fastattn.spec import AttnInputs, AttnSpec
from fastattn.testing import Case, make_inputs, simulator

ROOT = Path(__file__).resolve().parents[2]
NO_KERNELS = Path(__file__).parent / "kernels" / "no_kernels.cu"
ALLOWED = {
    "cudaGetDevice", "cudaSetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaLaunchKernelEx",
    "cudaGetLastError", "cudaGetErrorString", "cudaGetDriverEntryPoint", "cudaGetDriverEntryPointByVersion",
}  # fmt: skip
"""Of CUDA's runtime: neither memory nor a wait."""


@pytest.fixture(scope="module")
def no_kernels():
    """The backend's library without its kernels: all that a call does but the launch itself."""
    refused = simulator.why_not()
    if refused is not None:
        pytest.skip(refused)
    told = ('-DFASTATTN_CUDA_OPERATOR="no_kernels"', "-w")
    units = [(source, flags) for name, (source, flags) in nvcc.parts().items() if not name.startswith("forward")]
    parts = [simulator.Part(source, (*flags, *told)) for source, flags in [*units, (NO_KERNELS, ())]]
    link = ("-L" + str(compiler.torch_folder() / "lib"), "-ltorch_cpu")
    path = simulator.build_library("cuda_host", parts, "plain", link)
    handle = simulator.load(path)
    handle.fastattn_cuda_simulate(132)
    return cuda_library.Operators(torch.ops.fastattn.no_kernels.default, path, handle)


@pytest.fixture
def taken(no_kernels, take):
    """The backend takes CPU tensors, and its library is the one without kernels."""
    take(no_kernels)


CALLS = {"plain": (64, None), "causal": (64, Causal()), "decode": (1, None)}
"""By name: queries, mask."""


@pytest.mark.parametrize("part", ["backend", "call"])
@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_costs_the_host(name, part, benchmark, taken, unfilled_memory):
    """The backend's part, from a checked spec to the launch, and the whole call: Python, operator and launch code, the
    output's memory too; not what the driver takes for a launch.
    """
    q_len, mask = CALLS[name]
    query, key = torch.randn(1, 8, q_len, 128).bfloat16(), torch.randn(1, 2, 512, 128).bfloat16()
    inputs = AttnInputs(query, key, key)
    spec = AttnSpec.of(inputs, mask=mask)
    with torch.no_grad():
        if part == "backend":
            benchmark(cuda.forward, spec, inputs)
        else:
            benchmark(attention, query, key, key, mask=mask, backend="cuda")


def test_the_page_says_what_was_measured():
    """Printed anew: pytest tests/cuda/test_host.py -k cost --benchmark-enable --benchmark-max-time=0.05
    --benchmark-json=bench/results/host/cuda.json
    """
    measured = json.loads((ROOT / "bench" / "results" / "host" / "cuda.json").read_text())
    median = {each["param"]: each["stats"]["median"] * 1e6 for each in measured["benchmarks"]}
    page = (ROOT / "docs" / "cuda.md").read_text()
    for name in CALLS:
        assert f"| {name} | {median[f'{name}-backend']:.1f} | {median[f'{name}-call']:.1f} |" in page


def test_a_launch_takes_no_memory_and_waits_for_nothing():
    """What a CUDA graph could not capture."""
    root = compiler.sources()
    files = [root / "ops.cpp", *(root / "cuda").rglob("*.h"), *(root / "cuda").rglob("*.cu")]
    used = set().union(*(re.findall(r"\b(cuda[A-Z]\w*)\(", path.read_text()) for path in files))
    assert used and used <= ALLOWED, used - ALLOWED


def test_an_error_names_the_launch(no_kernels):
    problem = make_inputs(Case("error", 5, 40, 1, 4, 2, 64, dtype=torch.float16))
    query, key, value = problem.inputs[:3]
    odd = torch.cat([key[..., :1], key], -1)[..., 1:]  # rows at no multiple of 16 bytes
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3])
    with pytest.raises(RuntimeError) as refusal:
        no_kernels.forward(
            query, odd, value, None, None, None, [], [], 0.1, 0.0, 0.0, cuda.MASKED, False, None, None,
            1, None, None, None, out, lse,
        )  # fmt: skip
    said = str(refusal.value)
    assert "the CUDA forward: tensor map" in said
    for part in (
        "float16",
        "variant 1",
        "splits 1",
        "num_heads 4",
        "num_kv_heads 2",
        "q_len 5",
        "kv_len 40",
        "head_dim 64",
    ):
        assert part in said, said


def test_a_gradient_is_refused_at_the_forward_when_compiled_too(taken):
    """Compiled graphs run their forward without grad mode: the backend would be found to have no backward too late."""
    query = torch.randn(1, 2, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(lambda each: attention(each, each, each, backend="cuda"), backend="aot_eager")
    with pytest.raises(Exception, match="backward does not exist yet"):
        compiled(query)
    with pytest.raises(BackendUnavailable, match="backward does not exist yet"):
        attention(query, query, query, backend="cuda")
    with torch.no_grad():
        compiled(query)
    torch._dynamo.reset()
