"""What a launch hands to the driver, through Triton's own launcher and packed_launch, against a stand-in for libcuda.
Run by test_launcher.py in processes of their own: Triton's interpreter, which the other tests use, has no launcher.
"""

import ctypes
import gc
import threading
import time
import weakref

import driver as stubbing
import pytest
import torch
from driver import tensors
from triton import knobs

from fastattn import attention
from fastattn.backends import triton as backend
from fastattn.kernels.host import launch, packed_launch, run
from fastattn.kernels.inspect import compile_cases
from fastattn.masks import Causal, Lengths
from fastattn.spec import AttnInputs, AttnSpec

CAPABILITIES = {"sm90": 90, "sm80": 80}
ROWS = [(case, 64, "bf16") for case in compile_cases.COMPILE_CASES if case != "tf32"]
ROWS += [("bare", 64, "fp32"), ("tf32", 64, "fp32"), ("bare", 80, "bf16"), ("causal", 128, "fp16")]


@pytest.fixture(params=CAPABILITIES)
def target(request, stub, monkeypatch):
    """A device of this kind, for tensors on the CPU; and nothing known of earlier calls."""
    stub.activate(CAPABILITIES[request.param])
    monkeypatch.setattr(launch, "target_for", lambda device: request.param)
    monkeypatch.setattr(backend, "why_not", lambda spec: None)
    monkeypatch.setattr(run, "_PLANS", {})
    run._THREAD.launched = True  # else a thread's first call is Triton's
    return request.param


def passes(case, head_dim, dtype, target):
    """The plans of a case's passes with a call's tensors."""
    spec, inputs = compile_cases.call(compile_cases.COMPILE_CASES[case], head_dim, compile_cases.DTYPES[dtype], "cpu")
    out, lse = spec.empty_out(inputs.query), spec.empty_lse(inputs.query)
    given = launch.forward_tensors(spec, inputs, out, lse)
    yield spec, run.ReadyPlan(launch.plan_forward(spec, given, target)), given
    if spec.pages is None:
        grads = map(torch.empty_like, inputs[:3])
        dbias = None if inputs.bias is None else launch.empty_dbias(spec, inputs.bias)
        dsinks = None if inputs.sinks is None else launch.empty_dsinks(spec, inputs.sinks, target)
        terms = launch.empty_terms(spec, lse)
        tensors = launch.Backward(out, lse, torch.empty_like(out), lse, *terms, *grads, dbias, dsinks)
        given = launch.backward_tensors(spec, inputs, tensors)
        yield spec, run.ReadyPlan(launch.plan_backward(spec, given, target)), given


@pytest.mark.parametrize(("case", "head_dim", "dtype"), ROWS)
def test_every_parameter_is_handed_over(stub, target, case, head_dim, dtype):
    """As many as the kernel's PTX declares and as wide, each with the argument's own bytes; packed as by Triton."""
    seen, wanted = set(), compile_cases.COMPILE_CASES[case].kernels
    for spec, ready, given in passes(case, head_dim, dtype, target):
        given = given | ready.plan.more_tensors(spec, given)
        for each in ready.launches:
            planned = each.launch
            bound = planned.bound(given | planned.block_lists(spec))
            if planned.row.kernel not in wanted:
                continue
            binary = bound.kernel.warmup(*bound.args, grid=(bound.programs,), **bound.options)
            sizes = packed_launch.declared(binary.asm["ptx"])
            want = [part for arg in bound.args for part in stubbing.expected(arg)] + stubbing.SCRATCH
            said = []
            for stream in (None, 0):
                stub.expect(sizes)
                each.run(spec, given, run._addresses(given), stream)
                stub.expect(())
                assert stubbing.differences(stub.parameters(sizes), want) == [], (planned.row.kernel, stream)
                said.append((stub.parameters(sizes), stub.launched()[:3]))
            assert each.packed is not None
            assert said[0] == said[1], planned.row.kernel  # the swizzle too
            grid, threads, shared = said[0][1]
            assert grid == (planned.programs, 1, 1) and threads == 32 * binary.metadata.num_warps
            assert shared == binary.metadata.shared
            seen.add(planned.row.kernel)
    assert seen, "the case launches nothing"


@pytest.fixture
def launched(monkeypatch):
    """What packed launches were handed: the addresses, by name, as they lie in the buffer."""
    found, plain = [], packed_launch.PackedLaunch.run

    def running(self, addresses, stream):
        plain(self, addresses, stream)
        held = {name: self._words[place] for name, place in self.pointers}
        maps = {name: ctypes.c_uint64.from_address(place).value for name, place in self.maps}
        found.append((self.name, held | maps))

    monkeypatch.setattr(packed_launch.PackedLaunch, "run", running)
    return found


def test_other_tensors_of_the_same_shape_bring_their_addresses(target, launched):
    """Freed and moved in between."""
    spec, kept = None, []
    for turn in range(4):
        query, key, value = tensors()
        spec = AttnSpec.of(AttnInputs(query, key, value), mask=Causal())
        out, lse = backend.forward(spec, AttnInputs(query, key, value))
        want = {"query": query, "key": key, "value": value, "out": out, "lse": lse}
        if turn:  # the first is Triton's
            [(name, addresses)] = launched
            assert name == "attn_fwd_kernel"
            assert addresses == {name: each.data_ptr() for name, each in want.items()}
        kept.append(query if turn % 2 else (key, out))
        launched.clear()
        del query, key, value, out, lse, want
        gc.collect()
    assert len(run._PLANS) == 1


def test_the_backward_brings_its_addresses(target, launched):
    for turn in range(3):
        leaves = tensors(requires_grad=True)
        out = attention(*leaves, mask=Causal(), backend="triton")
        d_out = torch.randn_like(out)
        grads = torch.autograd.grad(out, leaves, d_out)
        if turn:
            assert [name for name, _ in launched] == [
                "attn_fwd_kernel", "attn_delta_kernel", "attn_dq_kernel", "attn_dkv_kernel",
            ]  # fmt: skip
            want = dict(zip(("query", "key", "value"), leaves, strict=True)) | {"out": out, "d_out": d_out}
            want |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
            for _, addresses in launched:
                for name in addresses.keys() & want.keys():
                    assert addresses[name] == want[name].data_ptr(), name
        launched.clear()
    assert len(run._PLANS) == 2


@pytest.mark.parametrize("spare", [1, 4, 8])
def test_an_address_that_16_does_not_divide_is_another_plan(target, launched, spare):
    """Triton compiles loads of whole vectors for those that it divides, and a descriptor takes no other."""
    for aside in (0, spare, 0, spare):
        query, key, value = tensors(spare=aside)
        assert (query.data_ptr() % 16 == 0) == (aside % 8 == 0)
        inputs = AttnInputs(query, key, value)
        backend.forward(AttnSpec.of(inputs), inputs)
    assert len(run._PLANS) == (1 if spare % 8 == 0 else 2)
    assert len(launched) == (3 if spare % 8 == 0 else 2)
    assert all(addresses["query"] == query.data_ptr() for _, addresses in launched[-1:])


CHANGED = {
    "strides": lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v),
    "length": lambda q, k, v: (q, k[:, :, :90], v[:, :, :90]),
    "heads": lambda q, k, v: (q, k[:, :1], v[:, :1]),
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED)
def test_tensors_that_lie_otherwise_are_another_plan(target, changed):
    given = tensors()
    for each in (given, changed(*given)):
        inputs = AttnInputs(*each)
        backend.forward(AttnSpec.of(inputs), inputs)
    assert len(run._PLANS) == 2


def test_a_masks_tensors_are_read_where_they_are_now(target, launched):
    query, key, value = tensors()
    inputs = AttnInputs(query, key, value)
    for _ in range(3):
        lengths = torch.tensor([150], dtype=torch.int32)
        backend.forward(AttnSpec.of(inputs, mask=Lengths(lengths)), inputs)
        assert all(addresses["mask0"] == lengths.data_ptr() for _, addresses in launched[-1:])
    assert len(run._PLANS) == 1 and len(launched) == 2


def test_threads_do_not_mix_their_addresses(target, monkeypatch):
    """One buffer serves them all: what a launch finds in it is one call's."""
    given = [tensors() for _ in range(4)]
    specs = [AttnSpec.of(AttnInputs(*each)) for each in given]
    for spec, each in zip(specs, given, strict=True):  # the second one packs
        backend.forward(spec, AttnInputs(*each))
    [ready] = run._PLANS.values()
    [one] = [each.packed for each in ready.launches]
    seen, library = [], one.library

    class Slow:
        def __getattr__(self, name):
            return getattr(library, name)

        def cuLaunchKernelEx(self, *_):
            time.sleep(0.001)
            held = {name: one._words[place] for name, place in one.pointers}
            seen.append(held | {name: ctypes.c_uint64.from_address(place).value for name, place in one.maps})
            return 0

    monkeypatch.setattr(one, "library", Slow())
    problems = list(zip(specs, given, strict=True))

    def call(spec, each):
        run._THREAD.launched = True
        for _ in range(20):
            backend.forward(spec, AttnInputs(*each))

    threads = [threading.Thread(target=call, args=problem) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80
    whole = [{each.data_ptr() for each in query_key_value} for query_key_value in given]
    assert all({held["query"], held["key"], held["value"]} in whole for held in seen)


def test_hooked_launches_are_tritons_own(target, launched):
    """Profilers hook them."""
    query, key, value = tensors()
    inputs, calls = AttnInputs(query, key, value), []
    hook = calls.append
    for hooked in (False, False, True, False):
        if hooked:
            knobs.runtime.launch_enter_hook.add(hook)
        backend.forward(AttnSpec.of(inputs), inputs)
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(calls) == 1 and calls[0].get()["name"] == "attn_fwd_kernel"
    assert len(launched) == 2


def test_a_threads_first_call_is_tritons_own(target, launched):
    """Its launcher makes a CUDA context current where a thread has none."""
    query, key, value = tensors()
    inputs = AttnInputs(query, key, value)
    spec = AttnSpec.of(inputs)
    backend.forward(spec, inputs)
    counts = []

    def call():
        nothing = AttnInputs(query[:0], key[:0], value[:0])
        for each in (nothing, inputs, inputs):  # a call without work launches nothing
            backend.forward(AttnSpec.of(each), each)
            counts.append(len(launched))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert counts == [0, 0, 1]


def test_a_failed_launch_says_which_and_why(target, monkeypatch):
    query, key, value = tensors()
    inputs = AttnInputs(query, key, value)
    spec = AttnSpec.of(inputs)
    for _ in range(2):
        backend.forward(spec, inputs)
    [ready] = run._PLANS.values()
    [one] = [each.packed for each in ready.launches]
    library = one.library

    class Refusing:
        cuGetErrorString = library.cuGetErrorString
        cuTensorMapReplaceAddress = library.cuTensorMapReplaceAddress
        cuLaunchKernelEx = staticmethod(lambda *_: 1)

    monkeypatch.setattr(one, "library", Refusing())
    with pytest.raises(RuntimeError, match=r"attn_fwd_kernel: the launch failed: invalid argument \(CUDA error 1\)"):
        backend.forward(spec, inputs)


def test_what_is_not_known_is_left_to_tritons_launcher(target):
    """More thread blocks in a cluster, memory of a profiler: what packed launches do not hand over."""
    [(_, ready, given), *_] = passes("bare", 64, "bf16", target)
    [each] = ready.launches
    bound = each.launch.bound(given)
    compiled = bound.run()
    assert packed_launch.pack(compiled, 1, each.launch.args, bound.args) is not None

    class Other:
        def __init__(self, **changed):
            self.src, self.asm, self.name = compiled.src, compiled.asm, compiled.name
            self.function, self.packed_metadata = compiled.function, compiled.packed_metadata
            self.metadata = compiled.metadata._replace(**changed)

    for changed in ({"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 8}, {"profile_scratch_size": 8}):
        assert packed_launch.pack(Other(**changed), 1, each.launch.args, bound.args) is None, changed
    bare = Other()
    bare.asm = {}  # TRITON_STORE_BINARY_ONLY
    assert packed_launch.pack(bare, 1, each.launch.args, bound.args) is None
    cut = Other()
    cut.asm = {"ptx": compiled.asm["ptx"].replace(".param .u64", ".param .u32", 1)}
    assert packed_launch.pack(cut, 1, each.launch.args, bound.args) is None


def test_a_length_that_is_met_once_packs_nothing(target, launched, monkeypatch):
    """Each token of a cache that grows is a plan of its own, and packing costs more than one launch."""
    packs, pack = [], run.pack
    monkeypatch.setattr(run, "pack", lambda *given: packs.append(1) or pack(*given))
    query, key, value = tensors(q_len=1)
    for kv_len in (100, 101, 102, 102):
        inputs = AttnInputs(query, key[:, :, :kv_len], value[:, :, :kv_len])
        backend.forward(AttnSpec.of(inputs), inputs)
    assert len(packs) == len(launched) == 1


def test_a_driver_without_descriptors_is_left_to_tritons_launcher(target, launched, monkeypatch):
    """cuTensorMapReplaceAddress came with CUDA 12."""

    class Old:
        def __init__(self, name):
            self.library = library(name)

        def __getattr__(self, name):
            if name.startswith("cuTensorMap"):
                raise AttributeError(f"undefined symbol: {name}")
            return getattr(self.library, name)

    library = ctypes.CDLL
    monkeypatch.setattr(packed_launch, "_libcuda", packed_launch._libcuda.__wrapped__)
    monkeypatch.setattr(packed_launch.ctypes, "CDLL", Old)
    query, key, value = tensors()
    inputs = AttnInputs(query, key, value)
    for _ in range(2):
        backend.forward(AttnSpec.of(inputs), inputs)
    assert launched == []


def test_a_packed_launch_keeps_its_kernel_loaded(target, launched):
    """Triton 3.8 and 3.9 unload a compiled kernel with the object."""
    query, key, value = tensors()
    inputs = AttnInputs(query, key, value)
    for _ in range(2):
        backend.forward(AttnSpec.of(inputs), inputs)
    [ready] = run._PLANS.values()
    [one] = ready.launches
    kernels = one.launch.kernel.device_caches
    of = [each for kept in kernels.values() for each in kept[0].values() if each.function == one.packed._function]
    [held] = map(weakref.ref, of)
    one.compiled = None
    of.clear()
    kernels.clear()
    gc.collect()
    assert held() is not None
