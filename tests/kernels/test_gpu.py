"""What only a GPU can show: long sequences, many heads, far addresses, graphs, waiting, bits, stray access."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.jit import JITFunction

from fastattn import attention
from fastattn.kernels.host import launch
from fastattn.masks import Causal, Chunked, Dense, Lengths, Packed, Prefix, Segments, Window
from fastattn.testing import CASES, Case, check_close, make_inputs, poison, run

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALF = torch.bfloat16
GIB = 2**30
BIG = 2**31
"""Elements that 32 bits cannot count."""


@pytest.fixture(autouse=True)
def give_memory_back():
    """To the other test processes."""
    yield
    torch.cuda.empty_cache()


def needs(gib):
    """Skips where the device has not so much memory left."""
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of device memory, {free / GIB:.1f} are free")


def problem_of(name, q_len, kv_len=None, mask=None, **fields):
    return make_inputs(Case(name, q_len, kv_len, mask=lambda case, device: mask, **fields), DEVICE)


def ints(*values):
    return torch.tensor(values, device=DEVICE)


# ---- sizes

LONG = 100_000
SEEN = {
    "causal": (Causal(), lambda q_idx, kv_idx: kv_idx <= q_idx),
    "window": (Window(1023, 0), lambda q_idx, kv_idx: (kv_idx <= q_idx) & (kv_idx >= q_idx - 1023)),
}


def some_of(length, count):
    """The first, the last, and evenly between."""
    return torch.linspace(0, length - 1, count, device=DEVICE).round().long()


def of_keys(problem, results, keys, seen):
    """dk and dv of some keys in float64, over all queries, from the lse and out that the kernels saved."""
    spec = problem.spec
    query, key, value, d_out = (each.double() for each in (*problem.inputs[:3], problem.d_out))
    key, value = (each[:, :, keys].repeat_interleave(spec.group, 1) for each in (key, value))
    scores = (spec.scale * query @ key.mT).masked_fill(~seen, -torch.inf)
    weights = (scores - results["lse"].double()[..., None]).exp()
    delta = (d_out * results["out"].double()).sum(-1) - problem.d_lse.double()
    d_scores = weights * (d_out @ value.mT - delta[..., None])
    both = spec.scale * d_scores.mT @ query, weights.mT @ d_out
    return [each.unflatten(1, (spec.num_kv_heads, spec.group)).sum(2) for each in both]


@pytest.mark.parametrize("name", SEEN)
def test_100k_tokens(name):
    """Queries here and there are within the tolerance, as a problem of their own; keys here and there within 1 %."""
    needs(24)
    mask, rule = SEEN[name]
    problem = problem_of(name, LONG, mask=mask, batch=1, num_heads=2, num_kv_heads=1, head_dim=64)
    results = run(problem, "triton")
    rows, keys, every = some_of(LONG, 96), some_of(LONG, 64), torch.arange(LONG, device=DEVICE)
    part = dataclasses.replace(
        problem,
        inputs=problem.inputs._replace(query=problem.inputs.query[:, :, rows]),
        mask=Dense(rule(rows[:, None], every)),
        d_out=problem.d_out[:, :, rows],
        d_lse=problem.d_lse[:, :, rows],
    )
    check_close(part, {each: results[each][:, :, rows] for each in ("out", "lse", "dq")})
    for each, want in zip(("dk", "dv"), of_keys(problem, results, keys, rule(every[:, None], keys)), strict=True):
        error = (results[each][:, :, keys].double() - want).norm() / want.norm()
        assert error < 0.01, each


@pytest.mark.parametrize("batch", [1, 7_000], ids=["heads", "heads-of-batches"])
def test_70_000_heads(batch):
    """More than the second axis of a grid could hold; each with numbers of its own."""
    needs(16)
    problem = problem_of("heads", 16, 24, Causal(), batch=batch, num_heads=70_000 // batch, head_dim=16, sinks=True)
    check_close(problem, run(problem, "triton"))


def test_results_of_more_than_2_to_31_elements():
    """The inputs repeat one head; so all heads' results, of which each has its own place, are the same."""
    needs(30)
    length, head_dim = 512, 64
    heads = BIG // (length * head_dim) + 100
    one = make_inputs(Case("one", length, batch=1, num_heads=1, head_dim=head_dim, mask=lambda *_: Causal()), DEVICE)
    leaves = [each.expand(-1, heads, -1, -1).requires_grad_() for each in one.inputs[:3]]
    with poison():
        out, lse = attention(*leaves, mask=one.mask, backend="triton", return_lse=True)
        above = one.d_out.expand_as(out), one.d_lse.expand_as(lse)
        grads = torch.autograd.grad((out, lse), leaves, above)
    assert all(each.numel() > BIG for each in (out, *grads))
    firsts = {}
    for name, result in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
        firsts[name] = result.detach()[:, :1]
        for part in result.detach().split(1024, 1):
            assert (part == firsts[name]).all(), name
    check_close(one, firsts)


@pytest.mark.parametrize("by", ["descriptors", "pointers"])
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "length"])
def test_inputs_that_reach_over_2_to_31_elements(axis, by):
    """The last entry along an axis lies beyond."""
    needs(8)
    problem = problem_of("far", 130, mask=Causal(), head_dim=64)
    shape = problem.inputs.query.shape
    strides = list(problem.inputs.query.stride())
    strides[axis] = BIG // (shape[axis] - 1) // 64 * 64 + 4 * problem.inputs.query.numel()
    reach = strides[axis] * (shape[axis] - 1)
    memory = torch.empty(reach + 5 * problem.inputs.query.numel(), dtype=HALF, device=DEVICE)

    def far(tensor, place):
        """At an odd address no descriptor can serve."""
        view = memory.as_strided(shape, strides, place * tensor.numel() + (by == "pointers"))
        return view.copy_(tensor)

    query, key, value, d_out = (far(each, n) for n, each in enumerate((*problem.inputs[:3], problem.d_out)))
    assert reach > BIG
    inputs = problem.inputs._replace(query=query, key=key, value=value)
    problem = dataclasses.replace(problem, inputs=inputs, d_out=d_out)
    check_close(problem, run(problem, "triton"))


@pytest.mark.parametrize("grads", [False, True], ids=["forward", "both"])
def test_memory_grows_with_the_length(grads):
    """Peaks beyond the inputs: 4 times the length, at most 4.2 times the bytes; never a table."""
    peaks = []
    for length in (8192, 4 * 8192):
        problem = problem_of("memory", length, mask=Causal(), batch=1, num_heads=4, head_dim=64)
        leaves = problem.inputs.detached(requires_grad=grads)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = attention(*leaves[:3], mask=problem.mask, backend="triton", return_lse=True)
        if grads:
            torch.autograd.grad((out, lse), leaves[:3], (problem.d_out, problem.d_lse))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del out, lse
    assert peaks[1] <= 4.2 * peaks[0]
    assert peaks[1] < length * length  # bytes: one a pair of a single head


# ---- graphs, waiting, order


def masks(q_len, kv_len, batch=2):
    """By name, a maker: what of a mask is read, and where."""
    table = torch.rand(batch, 1, q_len, kv_len, device=DEVICE) < 0.5
    ids = torch.randint(-1, 3, (batch, q_len), device=DEVICE), torch.randint(-1, 3, (batch, kv_len), device=DEVICE)
    documents = [(torch.arange(n, device=DEVICE) // 100).repeat(batch, 1) for n in (q_len, kv_len)]
    sizes = [torch.tensor([n // 2, n], device=DEVICE) for n in (kv_len, q_len)]
    offsets = torch.tensor([3, -5], device=DEVICE)
    return {
        "full": lambda: None,
        "causal": Causal,
        "offsets": lambda: Causal(offset=offsets),
        "lengths": lambda: Causal() & Lengths(*sizes),
        "chunked-prefix": lambda: Chunked(64, 1) | Prefix(sizes[0]),
        "documents": lambda: Segments(*documents, sorted=True),
        "segments": lambda: Segments(*ids),
        "table": lambda: Dense(table) & Causal(),
    }


MASKS = ("full", "causal", "offsets", "lengths", "chunked-prefix", "documents", "segments", "table")
N = 300


def call(problem, mask):
    """out, lse and every gradient, of leaves that are there already."""
    leaves = problem.inputs
    numbers = {"softcap": problem.case.softcap, "dropout_p": problem.case.dropout_p}
    out, lse = attention(**leaves._asdict(), mask=mask, backend="triton", return_lse=True, **numbers)
    return out, lse, *torch.autograd.grad((out, lse), leaves.differentiable, (problem.d_out, problem.d_lse))


def leaf_problem(name, q_len=N, **fields):
    """A problem whose inputs take gradients."""
    problem = problem_of(name, q_len, N, **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 64} | fields)
    return dataclasses.replace(problem, inputs=problem.inputs.detached())


FEATURES = {
    "plain": {},
    "everything": {"bias": (4, N, N), "sinks": True, "softcap": 5.0, "dropout_p": 0.2},
    "bias-of-keys": {"bias": (2, 1, 1, N)},
}


@pytest.mark.parametrize("features", FEATURES)
def test_a_call_never_waits_for_the_device(features):
    problem = leaf_problem("waits", **FEATURES[features])
    made = masks(N, N)
    names = MASKS if features == "plain" else ("lengths",)
    for name in names:
        call(problem, made[name]())  # what is compiled here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in names:
            call(problem, made[name]())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_packed_call_never_waits_for_the_device():
    problem = leaf_problem("packed", batch=1)
    mask = Packed(ints(0, 100, 100, N), ints(0, 150, 170, N), Causal())
    call(problem, mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(problem, Packed(mask.cu_q, mask.cu_kv, Causal()))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("q_len", [N, 2], ids=["", "few-queries"])
@pytest.mark.parametrize("name", ["causal", "lengths", "documents", "table"])
def test_a_graph_replays_with_new_numbers(name, q_len):
    """Inputs and the mask's own tensors change in place between replays; each gives the bits of an eager call."""
    problem = leaf_problem("graph", q_len, sinks=True, dropout_p=0.1)
    mask = masks(q_len, N)[name]()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(problem, mask)  # what is compiled here
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call(problem, mask)
    for step in range(3):
        with torch.no_grad():
            problem.inputs.query.normal_()
            for tensor in mask.tensors if mask else ():
                tensor.copy_(tensor.flip(-1) if tensor.dtype == torch.bool else (tensor - step).clamp(min=0))
        for each in replayed:
            each.detach().fill_(torch.nan)
        graph.replay()
        want = call(problem, mask)
        for left, right in zip(replayed, want, strict=True):
            assert torch.equal(left, right)  # nor is a NaN equal to itself


SAME = {
    "causal": {"mask": "causal", "q_len": 2000},
    "gqa": {"mask": "causal", "q_len": 2000, "num_kv_heads": 2},
    "bias": {"mask": "full", "q_len": 700, "bias": (1, 1, 700, 700), "sinks": True},
    "bias-of-keys": {"mask": "full", "q_len": 700, "bias": (700,)},
    "dropout": {"mask": "full", "q_len": 700, "dropout_p": 0.3},
    "segments": {"mask": "segments", "q_len": 2000},
    "split-keys": {"mask": "causal", "q_len": 1, "kv_len": 20_000, "num_kv_heads": 1},
    "float32": {"mask": "causal", "q_len": 700, "dtype": torch.float32},
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_bits_whatever_runs_beside(name):
    """Three runs, the last ones while another stream keeps the device busy."""
    fields = {"num_heads": 8, "head_dim": 64} | SAME[name]
    mask, q_len = fields.pop("mask"), fields["q_len"]
    problem = problem_of(name, mask=masks(q_len, fields.get("kv_len", q_len))[mask](), **fields)
    first = run(problem, "triton")
    side, other = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    for _ in range(2):
        with torch.cuda.stream(side):
            for _ in range(20):
                other @ other
        again = run(problem, "triton")
        assert [each for each in first if not torch.equal(first[each], again[each])] == []
    torch.cuda.synchronize()


# ---- kernels

LATER = {
    "causal": {"q_len": 300, "mask": Causal()},
    "decode": {"q_len": 1, "kv_len": 3000, "num_heads": 8, "num_kv_heads": 2},
    "padding": {"q_len": 200, "batch": 2, "mask": lambda: Lengths(ints(150, 77))},
    "table": {"q_len": 100, "mask": lambda: Dense(torch.rand(100, 100, device=DEVICE) < 0.5)},
}


@pytest.mark.parametrize("name", LATER)
def test_later_calls_read_their_own_tensors(name):
    """A structure's first call is launched by Triton, later ones packed; tensors are freed and moved in between."""
    fields, kept = dict(LATER[name]), []
    mask = fields.pop("mask", None)
    for turn in range(5):
        case = Case(name, mask=lambda *_: mask() if callable(mask) else mask, head_dim=64, **fields)
        problem = make_inputs(case, DEVICE, seed=turn)
        check_close(problem, run(problem, "triton"))
        kept.append(problem if turn % 2 else None)


def test_new_sizes_compile_nothing(monkeypatch):
    """Other lengths, batches, heads, scales, windows and layouts; all rows see something, and all keys are seen."""

    def go(batch, heads, q_len, kv_len, left, scale, layout="bhld"):
        mask = Window(left, 0)
        case = Case("new", q_len, kv_len, batch, heads, heads, 64, mask=lambda *_: mask, scale=scale, layout=layout)
        run(make_inputs(case, DEVICE), "triton")

    def refuse(self, *_):
        raise AssertionError(f"{self.fn.__name__} was compiled")

    go(2, 100, 300, 300, 50, 0.1)
    monkeypatch.setattr(JITFunction, "_do_compile", refuse)
    for sizes in ((1, 160, 301, 517, 300, 1.0), (16, 16, 1000, 1008, 16, 0.3), (160, 1, 129, 2000, 1999, 2.0)):
        go(*sizes)
    go(3, 64, 555, 556, 1, 0.1, "blhd")


def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_hoppers_copy_engine_and_persistent_programs_are_used(head_dim):
    """By the rows of the table, and in what was compiled."""
    hopper()
    problem = problem_of("rows", 4096, mask=Causal(), num_heads=16, head_dim=head_dim)
    spec = problem.spec
    out, lse = spec.empty_out(problem.inputs.query), spec.empty_lse(problem.inputs.query)
    [first] = launch.forward(spec, problem.inputs, out, lse, launch.target_for(spec.device))
    assert (first.row.target, first.row.descriptors, first.row.persistent) == ("sm90", True, True)
    assert first.programs == torch.cuda.get_device_properties(DEVICE).multi_processor_count
    binary = first.kernel.warmup(*first.args, grid=(first.programs,), **first.options)
    for instruction in ("cp.async.bulk.tensor", "wgmma.mma_async"):
        assert instruction in binary.asm["ptx"]


# ---- stray access

CHECKED = ("causal-empty-rows", "lengths-q", "segments-scattered", "everything", "one-query")
CHILD = """
import sys
from fastattn.testing import CASES, check_close, make_inputs, run
for name in sys.argv[1:]:
    problem = make_inputs(CASES[name], "cuda")
    check_close(problem, run(problem, "triton"))
print("all", len(sys.argv) - 1)
"""
TIMEOUT = 140


def sanitizer():
    """The tool's path, from the PATH or the toolkit; None where it is not installed."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(toolkit) if toolkit.exists() else None)


def test_no_access_outside_of_tensors():
    """Each tensor is an allocation of its own, so that one byte beyond it is an error."""
    tool = sanitizer()
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    assert set(CHECKED) <= set(CASES)
    command = [tool, "--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "9"]
    done = subprocess.run(
        [*command, sys.executable, "-c", CHILD, *CHECKED],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, f"all {len(CHECKED)}" in done.stdout) == (0, True), (done.stdout + done.stderr)[-4000:]
