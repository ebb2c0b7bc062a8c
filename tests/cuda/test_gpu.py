"""The CUDA backend on a Hopper GPU: what the simulator has shown once more, and what only hardware can show.

Where a test fails here, tests/sim/test_instructions.py says first whether one of the instructions is what is wrong.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastattn import attention, explain
from fastattn.masks import Causal, Lengths, Window
from fastattn.testing import CASES, Case, check_close, make_inputs, poison, run, with_dtype
from fastattn.testing.nan_padding import PADDED, hidden_pair, in_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]

DEVICE = "cuda"
HALVES = (torch.bfloat16, torch.float16)
WIDTHS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (40, 24), (100, 100))


def forward(problem):
    with torch.no_grad():
        return run(problem, "cuda", grads=False)


def same(left, right):
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_row_is_within_the_tolerance_and_repeats_bit_for_bit(case, dtype):
    bias_dtype = torch.float32 if case.bias_dtype == torch.float32 else dtype
    problem = make_inputs(dataclasses.replace(with_dtype(case, dtype), bias_dtype=bias_dtype), DEVICE)
    results = forward(problem)
    check_close(problem, results)
    same(results, forward(problem))


@pytest.mark.parametrize("width", WIDTHS, ids=lambda pair: "x".join(map(str, pair)))
@pytest.mark.parametrize("mask", [None, Causal(), Window(300, 20)], ids=["full", "causal", "window"])
def test_several_tiles_at_every_width(width, mask):
    case = Case("tiles", 777, 1234, 2, 6, 2, *width, mask=lambda *_: mask)
    problem = make_inputs(case, DEVICE)
    results = forward(problem)
    check_close(problem, results)
    for _ in range(20):  # a race shows now and then
        same(results, forward(problem))


@pytest.mark.parametrize("width", WIDTHS, ids=lambda pair: "x".join(map(str, pair)))
def test_every_feature_at_every_width(width):
    case = Case("features", 300, 600, 2, 4, 2, *width, mask=lambda *_: Causal(), bias=(1, 4, 300, 600), softcap=9.0,
                sinks=True, dropout_p=0.2)  # fmt: skip
    problem = make_inputs(case, DEVICE)
    check_close(problem, forward(problem))


@pytest.mark.parametrize("mask", PADDED)
def test_what_nobody_sees_may_hold_anything(mask):
    clean, dirty = hidden_pair(mask, 200, 300, DEVICE)
    want = forward(clean)
    same(want, forward(dirty))
    check_close(clean, want)


@pytest.mark.parametrize("q_len", [1, 7], ids=str)
def test_decoding_splits_the_keys(q_len):
    lengths = torch.tensor([5000, 33], device=DEVICE)
    problem = make_inputs(Case("decode", q_len, 5000, 2, 8, 2, 128, mask=lambda *_: Lengths(lengths)), DEVICE)
    results = forward(problem)
    check_close(problem, results)
    same(results, forward(problem))


@pytest.mark.parametrize("heads_in_rows", [False, True], ids=["heads-first", "heads-within-rows"])
@pytest.mark.parametrize("size", [1, 3, 16, 48, 64, 128, 256])
@pytest.mark.parametrize("q_len", [1, 150])
def test_blocks_of_any_size_are_read_in_place(q_len, size, heads_in_rows):
    """Boxes of fewer than eight rows begin within the pattern of a swizzle."""
    case = Case("blocks", q_len, 1500, 3, 8, 2, 128)
    whole, paged = in_blocks(case, None, (1500, 700, 0), size, heads_in_rows=heads_in_rows, device=DEVICE)
    results = forward(paged)
    check_close(whole, results)
    for _ in range(5):
        same(results, forward(paged))


@pytest.mark.parametrize("mask", [None, "causal", "lengths"], ids=str)
def test_a_call_waits_for_nothing(mask):
    """Not for the device either: a synchronisation is an error here."""
    query = torch.randn(2, 40, 2048, 64, device=DEVICE).bfloat16()
    masks = {"causal": Causal(), "lengths": Lengths(torch.tensor([2000, 900], device=DEVICE))}
    call = lambda: attention(query, query, query, mask=masks.get(mask), backend="cuda")
    with torch.no_grad():
        want = call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


def test_a_graph_of_calls_can_be_captured_and_replayed():
    problem = make_inputs(Case("graph", 300, 500, 2, 4, 2, 64, mask=lambda *_: Causal()), DEVICE)
    query, key, value = (each.clone() for each in problem.inputs[:3])

    def call():
        return attention(query, key, value, mask=Causal(), backend="cuda", return_lse=True)

    with torch.no_grad():
        call()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = call()
        query.mul_(0.5)
        graph.replay()
        want = call()
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_a_call_runs_on_the_stream_that_is_current():
    tensor = torch.randn(1, 4, 4096, 128, device=DEVICE).bfloat16()
    with torch.no_grad(), poison():
        want = attention(tensor, tensor, tensor, backend="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other = tensor * 1.0
            got = attention(other, other, other, backend="cuda")
        stream.synchronize()
    assert torch.equal(got, want)


def test_tensors_may_begin_at_any_multiple_of_16_bytes():
    """And rows lie at any: the copy engine asks for no more, whatever allocators give."""
    problem = make_inputs(Case("within", 300, 500, 2, 4, 2, 80, mask=lambda *_: Causal()), DEVICE)
    inputs = problem.inputs._replace(
        **{name: getattr(problem.inputs, name)[..., 8:72] for name in ("query", "key", "value")}
    )
    case = dataclasses.replace(problem.case, head_dim=64)
    problem = dataclasses.replace(problem, case=case, inputs=inputs, d_out=problem.d_out[..., :64])
    assert inputs.key.data_ptr() % 32 == 16 and inputs.key.stride(2) == 80
    check_close(problem, forward(problem))


def test_a_call_may_be_the_first_of_its_thread():
    """Tensor maps want a current context, which torch's allocator need not have made in a new thread."""
    tensor = torch.randn(1, 2, 300, 64, device=DEVICE).bfloat16()
    want = attention(tensor, tensor, tensor, backend="cuda")
    found = []

    def call():
        try:
            found.append(attention(tensor, tensor, tensor, backend="cuda"))
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert isinstance(found[0], torch.Tensor), found[0]
    assert torch.equal(found[0], want)


def test_a_call_runs_on_the_device_of_its_tensors():
    """Whichever device is current, before and after."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU is here")
    tensor = torch.randn(1, 2, 300, 64).bfloat16()
    first, last = (tensor.to(f"cuda:{n}") for n in (0, torch.cuda.device_count() - 1))
    want = attention(first, first, first, backend="cuda")
    got = attention(last, last, last, backend="cuda")
    assert got.device == last.device and torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), want.cpu())


TRAINED = ("gqa", "causal-empty-rows", "lengths", "table", "dropout", "everything")


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_come_from_triton_after_this_forward(name, ran):
    """The choice that nobody makes by name; tests/cuda/test_pair.py has more of it, simulated."""
    problem = make_inputs(dataclasses.replace(CASES[name], dtype=torch.bfloat16), DEVICE)
    leaves = problem.inputs.detached()
    verdict = explain(**leaves._asdict(), mask=problem.mask, **problem.numbers)
    if verdict.backward != "triton":
        pytest.skip(f"triton's backward cannot run here: {verdict.backward_reasons['triton']}")
    assert verdict.backend == "cuda"
    results = run(problem)
    assert ran == [("cuda", "forward"), ("triton", "backward")]
    check_close(problem, results)
    ran.clear()
    same(results, run(problem))


def test_more_tiles_than_an_axis_of_a_grid_has():
    tensor = torch.randn(70_000, 1, 16, 64, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        out = attention(tensor, tensor, tensor, backend="cuda")
        few = attention(tensor[-100:], tensor[-100:], tensor[-100:], backend="reference")
    assert (out[-100:].float() - few.float()).abs().max() < 0.05


def test_tensors_of_more_than_2_to_the_31_elements():
    """Rows of the last batch item lie beyond what an int32 counts."""
    shape = 2**18 + 3, 16, 8, 64
    if torch.cuda.get_device_properties(DEVICE).total_memory < 40 * 2**30:
        pytest.skip("it takes 40 GiB of a GPU's memory")
    tensor = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    assert tensor.numel() > 2**31
    with torch.no_grad():
        out = attention(tensor, tensor, tensor, mask=Causal(), backend="cuda")
        few = attention(tensor[-9:], tensor[-9:], tensor[-9:], mask=Causal(), backend="reference")
    assert (out[-9:].float() - few.float()).abs().max() < 0.05


CHECKED = ("one-by-one", "odd", "dim40", "causal-cross", "gqa", "lengths", "table", "everything", "strided")
CHILD = """
import sys
from fastattn.testing import CASES, HALF, check_close, make_inputs, run, with_dtype
for name in sys.argv[1:]:
    problem = make_inputs(with_dtype(CASES[name], HALF), "cuda")
    check_close(problem, run(problem, "cuda", grads=False))
print("all", len(sys.argv) - 1)
"""
TIMEOUT = 140


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    """memcheck: each tensor is an allocation of its own, so that one byte beyond it is an error."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    program = shutil.which("compute-sanitizer") or (str(toolkit) if toolkit.exists() else None)
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [program, "--tool", tool, "--target-processes", "application-only", "--error-exitcode", "9",
         sys.executable, "-c", CHILD, *CHECKED],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip
    assert (done.returncode, f"all {len(CHECKED)}" in done.stdout) == (0, True), (done.stdout + done.stderr)[-4000:]
