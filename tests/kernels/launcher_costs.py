"""What a call costs the host, through the stand-in for libcuda; see launcher_cases.py.

TRITON_INTERPRET=0 PYTHONPATH=tests/kernels/stub pytest tests/kernels/launcher_costs.py --benchmark-enable
--benchmark-max-time=0.05 --benchmark-json=bench/results/host/triton.json
"""

import pytest
import torch
from driver import tensors

from fastattn import attention
from fastattn.backends import triton as backend
from fastattn.kernels.host import launch
from fastattn.masks import Causal
from fastattn.spec import AttnInputs, AttnSpec

CALLS = {"plain": (64, None), "causal": (64, Causal()), "decode": (1, None)}
"""By name: queries, mask."""


@pytest.fixture
def hopper(stub, monkeypatch):
    stub.activate(90)
    monkeypatch.setattr(launch, "target_for", lambda device: "sm90")
    monkeypatch.setattr(backend, "why_not", lambda spec: None)


@pytest.mark.parametrize("part", ["forward", "backward", "call", "training"])
@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_costs_the_host(name, part, benchmark, hopper, unfilled_memory):
    """The backend's part of each pass, from a checked spec to the launches; the whole call without gradients; and a
    call with its backward. Python, the launches' preparation and memory; not what the driver takes.
    """
    q_len, mask = CALLS[name]
    query, key, value = tensors(q_len=q_len, kv_len=512)
    inputs = AttnInputs(query, key, value)
    spec = AttnSpec.of(inputs, mask=mask)
    if part == "forward":
        call = lambda: backend.forward(spec, inputs)
    elif part == "backward":
        out, lse = backend.forward(spec, inputs)
        d_out = torch.randn_like(out)
        call = lambda: backend.backward(spec, inputs, out, lse, d_out, None)
    elif part == "call":
        call = lambda: attention(query, key, value, mask=mask, backend="triton")
    else:
        leaves = [each.clone().requires_grad_() for each in (query, key, value)]
        d_out = torch.randn_like(query)
        call = lambda: torch.autograd.grad(attention(*leaves, mask=mask, backend="triton"), leaves, d_out)
    for _ in range(3):  # compiled, planned, packed
        call()
    benchmark(call)


class Nothing(torch.autograd.Function):
    """What torch takes for a function of three tensors in Python, its gradients too."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, d_out):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def test_what_nothing_costs_the_host(benchmark, unfilled_memory):
    leaves = tensors(kv_len=512, requires_grad=True)
    d_out = torch.randn_like(leaves[0])
    benchmark(lambda: torch.autograd.grad(Nothing.apply(*leaves), leaves, d_out))
