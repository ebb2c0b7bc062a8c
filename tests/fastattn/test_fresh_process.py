"""What would end a process: a second import, other sources, files that cannot be locked, a small stack."""

import subprocess
import sys
import textwrap

import pytest


def fresh(code, *arguments):
    """Standard output of a new process, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


AGAIN = """
import sys
import torch
import fastattn

def run(module):
    query = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    call = lambda each: module.attention(each, each, each, mask=module.masks.Window(3, 0))
    out = call(query)
    (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), query)
    recorded = torch.jit.trace(call, query.detach(), check_trace=False)(query.detach())
    vmapped = torch.func.vmap(call)(query.detach()[None])[0]
    print(module.explain(query, query, query).backend)
    return out, first, second, recorded, vmapped

def forget():
    for name in [each for each in sys.modules if each.split(".")[0] == "fastattn"]:
        del sys.modules[name]

results = [run(fastattn)]
old = fastattn
for _ in range(2):
    forget()
    import fastattn
    assert fastattn is not old
    results.append(run(fastattn))
results.append(run(old))
import torch.utils.flop_counter
for each in results[1:]:
    assert all(map(torch.equal, each, results[0]))

query = torch.randn(1, 2, 9, 8)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
    fastattn.attention(query, query, query)
assert counted.get_total_flops() > 0
try:  # the operator's way reaches the import that is the process's now
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        fastattn.attention(query, query, query, backend="cuda")
except fastattn.BackendUnavailable:
    print("refused")
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fastattn_can_be_imported_again(library):
    assert fresh(AGAIN).split() == ["cpu"] * 4 + ["refused"]


PATCHED_AGAIN = """
import sys
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
fast = torch.backends.mha.get_fastpath_enabled
now = lambda: (F.scaled_dot_product_attention, F.multi_head_attention_forward, fast())
own = now()
query = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
nodes, frames = torch.autograd.function.BackwardCFunction, torch.utils.checkpoint._CheckpointFrame
hooks = lambda: (nodes.__init__, nodes.apply, frames.__init__, torch.utils.checkpoint._recomputation_hook.__enter__)
calls = []

def imported(name):
    for each in [each for each in sys.modules if each.split(".")[0] == "fastattn"]:
        del sys.modules[each]
    import fastattn
    from fastattn.torch_api import mha, sdpa
    for module in (mha, sdpa):
        def noted(*args, run=module.attention, **kwargs):
            calls.append(name)
            return run(*args, **kwargs)
        module.attention = noted
    return fastattn

def attend(q):
    return F.scaled_dot_product_attention(q, q, q)

def routed(run, *wants):
    del calls[:]
    found = run()
    assert calls == list(wants), calls
    return found

def again(reentrant):
    return torch.autograd.backward(checkpoint(attend, query, use_reentrant=reentrant).sum())

module, x = torch.nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
want, of_module = attend(query), module(x, x, x)[0]
first = imported("first")
if sys.argv[1] == "installed before":
    first.patch.install("reference")
    routed(lambda: attend(query), "first")
else:
    with first.patch("reference"):
        routed(lambda: again(True), "first", "first")
followed = hooks()
second = imported("second")
assert second is not first
if sys.argv[1] == "installed before":
    routed(lambda: attend(query), "first")  # until the second takes over
    if sys.argv[2] == "second, uninstall alone":
        second.patch.uninstall()
        assert now() == own
        routed(lambda: attend(query))
second.patch.install("reference")
assert sys.modules["fastattn.torch_api.mha"].TORCH_MHA is own[1]
torch.testing.assert_close(routed(lambda: attend(query), "second"), want)
torch.testing.assert_close(routed(lambda: module(x, x, x)[0], "second"), of_module)
for reentrant in (True, False):
    routed(lambda: again(reentrant), "second", "second")
    with first.patch():
        routed(lambda: attend(query), "first")
        routed(lambda: again(reentrant), "first", "first")
        with second.patch():
            routed(lambda: again(reentrant), "second", "second")
recorded = checkpoint(attend, query, use_reentrant=False)
assert hooks() == followed
(first if sys.argv[2] == "first" else second).patch.uninstall()
assert now() == own
torch.testing.assert_close(routed(lambda: attend(query)), want)
for reentrant in (True, False):
    routed(lambda: again(reentrant))
with second.patch("reference"):
    routed(lambda: module(x, x, x), "second")
    plain = imported("third").patch
    assert plain is not second.patch
routed(lambda: recorded.sum().backward(), "second")
for each in (first, second):
    each.patch.install()
    each.patch.uninstall()
    assert now() == own
print("restored")
"""


@pytest.mark.parametrize(
    ("order", "ends"),
    [
        ("installed before", "first"),
        ("installed before", "second"),
        ("installed before", "second, uninstall alone"),
        ("within before", "second"),
    ],
)
def test_what_is_installed_is_so_for_every_import(library, order, ends):
    """A second import takes over what a first has installed, and torch gets its own back from either."""
    assert fresh(PATCHED_AGAIN, order, ends) == "restored\n"


OTHER_SOURCES = """
import sys
import torch
import fastattn
from fastattn.building.cpu_library import LIBRARY
LIBRARY.get()
for name in [each for each in sys.modules if each.split(".")[0] == "fastattn"]:
    del sys.modules[name]
import fastattn
from fastattn.building import compiler
compiler.source_digest = lambda backend: "others"
query = torch.randn(1, 2, 5, 8)
try:
    fastattn.attention(query, query, query, backend="cpu")
except fastattn.BackendUnavailable as refusal:
    print(refusal)
"""


def test_after_a_change_of_the_sources_it_says_why_not(library):
    assert "which was made from other sources, and it can load one CPU library; restart it" in fresh(OTHER_SOURCES)


NO_LOCKS = """
import os, sys, warnings
import torch
sys.modules["fcntl"] = None  # as on Windows
del os.O_NOFOLLOW, os.getuid
import fastattn
query = torch.randn(1, 2, 5, 8)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    fastattn.attention(query, query, query)
print(*[each.message for each in warned])
print(fastattn.explain(query, query, query).reasons["cpu"])
"""


def test_where_files_cannot_be_locked_the_reference_serves():
    warned, reason = fresh(NO_LOCKS).splitlines()
    assert warned.startswith("fastattn computes with its plain reference on the CPU, slowly: ")
    assert "a library is built on Linux and macOS; elsewhere a wheel must bring it" in warned and reason in warned


SMALL_STACK = """
import sys, threading
import torch
import fastattn
stack, backend, mode, loaded = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
query = torch.randn(1, 2, 300, 64, dtype=getattr(torch, sys.argv[5]), requires_grad=mode == "backward")
def call():
    if mode == "weights":
        return fastattn.attention_weights(query, query)
    out = fastattn.attention(query, query, query, mask=fastattn.masks.Causal(), softcap=30.0, backend=backend)
    return out.sum().backward() if mode == "backward" else out
if loaded == "loaded":
    call()
def run():
    try:
        call()
        print("ran")
    except RuntimeError as refusal:
        print(refusal)
threading.stack_size(stack)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
SAYS = "this thread has less than 32,768 bytes of stack left, which the CPU kernels may take"


@pytest.mark.parametrize("loaded", ["loaded", "not loaded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "backward", "weights"])
def test_a_thread_with_a_small_stack_gets_a_sentence(library, mode, dtype, loaded):
    """32 KB are less than the kernels may take, which nobody can mend in the middle of one. A backward runs in a thread
    of torch's, unless its forward is refused."""
    said = fresh(SMALL_STACK, "32768", "cpu", mode, loaded, dtype)
    assert SAYS in said and "threading.stack_size" in said


@pytest.mark.parametrize("mode", ["forward", "backward", "weights"])
def test_a_thread_with_enough_of_a_stack_runs(library, mode):
    assert fresh(SMALL_STACK, "131072", "cpu", mode, "loaded", "float32") == "ran\n"
