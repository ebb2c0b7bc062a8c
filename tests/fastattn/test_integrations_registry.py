"""fastattn as a flash-attention implementation of torch's registry: offered, activated, put back."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as registry_of_torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from fastattn import attention, ops, varlen_attention
from fastattn.integrations.torch import registry
from fastattn.masks import Causal, Window


@pytest.fixture
def calls(monkeypatch):
    """A word for each attention that fastattn computes, forward or backward."""
    found, forward, backward = [], ops._run_forward, ops._run_backward
    monkeypatch.setattr(ops, "_run_forward", lambda *args: found.append("forward") or forward(*args))
    monkeypatch.setattr(
        ops, "_run_backward", lambda *args, **named: found.append("backward") or backward(*args, **named)
    )
    return found


@pytest.fixture
def active():
    registry_of_torch.activate_flash_attention_impl(registry.register())
    yield
    if registry_of_torch.current_flash_attention_impl():
        registry_of_torch.restore_flash_attention_impl()


def tensors(device, q_len=9, kv_len=9, dtype=torch.float32):
    return [
        torch.randn(2, n, 4, 16, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (q_len, kv_len, kv_len)
    ]


TABLE = torch.rand(9, 9) > 0.3
TABLE[:, 0] = True
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": TABLE},
    "float mask": {"attn_mask": torch.randn(2, 1, 9, 9)},
    "scale": {"scale": 0.2},
}


def results(given, **arguments):
    out = F.scaled_dot_product_attention(*given, **arguments)
    return out, *torch.autograd.grad(out.square().sum(), given)


def same(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-4, "atol": 1e-4} | tolerance))


def test_importing_registers_nothing(tmp_path):
    code = (
        "import torch, fastattn, fastattn.integrations.torch.registry as ours; from torch.nn import attention as a; "
        "assert 'fastattn' not in a.list_flash_attention_impls(); ours.register(); ours.register(); "
        "assert 'fastattn' in a.list_flash_attention_impls() and a.current_flash_attention_impl() is None"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CALLS)
def test_sdpa_while_it_is_active(name, calls):
    given, arguments = tensors("cpu"), CALLS[name]
    want = results(given, **arguments)
    registry_of_torch.activate_flash_attention_impl(registry.register())
    try:
        have = results(given, **arguments)
    finally:
        registry_of_torch.restore_flash_attention_impl()
    same(have, want)
    assert calls == ["forward", "backward"]
    assert all(torch.equal(a, b) for a, b in zip(results(given, **arguments), want, strict=True))
    assert len(calls) == 2
    assert have[0].stride() == want[0].stride()


def test_grouped_heads_and_the_math_way(active, calls):
    query, key = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert not calls
    same([F.scaled_dot_product_attention(query, key, key, enable_gqa=True)], [want])
    assert calls == ["forward"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graphs_go_there(active, backend, calls):
    given = tensors("cpu")
    want = results(given, is_causal=True)
    torch._dynamo.reset()
    step = torch.compile(
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), fullgraph=True, backend=backend
    )
    del calls[:]
    out = step(*given)
    same([out, *torch.autograd.grad(out.square().sum(), given)], want)
    assert calls == ["forward", "backward"]


CU = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
needs_blocks = pytest.mark.skipif(
    "block_table" not in inspect.signature(varlen_attn).parameters, reason="this torch's varlen_attn has no block_table"
)
WINDOWS = {(-1, -1): None, (-1, 0): Causal(), (2, 0): Window(2, 0), (1, 3): Window(1, 3), (-1, 2): Window(None, 2)}


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_torchs_varlen_attn_runs_on_a_cpu(active, window, calls):
    given = [torch.randn(9, 4, 16, requires_grad=True) for _ in range(3)]
    out = varlen_attn(*given, CU, CU, 6, 6, window_size=window)
    want = varlen_attention(*given, CU, mask=WINDOWS[window])
    same(
        [out, *torch.autograd.grad(out.square().sum(), given)],
        [want, *torch.autograd.grad(want.square().sum(), given)],
    )
    assert calls == ["forward", "forward", "backward", "backward"]


@needs_blocks
def test_varlen_attn_with_blocks(active):
    table, used = torch.tensor([[4, 1], [0, 3]], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
    pools = torch.randn(2, 5, 2, 4, 16)
    query, cu_q = torch.randn(3, 4, 16), torch.tensor([0, 1, 3], dtype=torch.int32)
    k, v = (torch.cat([pool[[4, 1]].flatten(0, 1)[:3], pool[[0, 3]].flatten(0, 1)]) for pool in pools)
    with torch.no_grad():
        out = varlen_attn(query, *pools, cu_q, None, 2, 4, window_size=(-1, 0), seqused_k=used, block_table=table)
    same([out], [varlen_attention(query, k, v, cu_q, torch.tensor([0, 3, 7], dtype=torch.int32), mask=Causal())])


@needs_blocks
def test_what_it_does_not_take_is_refused(active):
    x = torch.randn(9, 4, 16)
    with pytest.raises(NotImplementedError, match="seqused_k: the flash-attention implementation 'fastattn' does not"):
        varlen_attn(x, x, x, CU, CU, 6, 6, seqused_k=CU[1:])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_operators_of_the_gpu_carry_their_state(dropout_p):
    """What stands for CUDA's operators, on the CPU: nine results, of which the seed finds its way to the backward."""
    given = tensors("cpu")
    torch.manual_seed(0)
    out, lse, _, _, q_len, kv_len, state, offset, table = registry._for_cuda(*given, dropout_p, True, scale=0.3)
    assert (q_len, kv_len) == (9, 9) and state.dtype == offset.dtype == torch.uint64 and not table.numel()
    assert out.stride() == given[0].stride() and not out.requires_grad
    seed = state.view(torch.int64)[:1] if dropout_p else None
    want = attention(*given, mask=Causal(), scale=0.3, dropout_p=dropout_p, dropout_seed=seed)
    grads = registry._for_cuda_backward(
        torch.ones_like(out), *given, out, lse, None, None, q_len, kv_len, dropout_p, True, state, offset, scale=0.3
    )
    same([out, *grads], [want, *torch.autograd.grad(want.sum(), given)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "causal", "scale"])
def test_sdpa_on_a_gpu(name, dtype, calls):
    given = tensors("cuda", dtype=dtype)
    with sdpa_kernel(SDPBackend.MATH):
        want = results(given, **CALLS[name])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        registry_of_torch.activate_flash_attention_impl(registry.register())
        try:
            same(results(given, **CALLS[name]), want, rtol=0.05, atol=0.05)
            assert calls == ["forward", "backward"]
            torch.manual_seed(0)
            dropped = F.scaled_dot_product_attention(*given, dropout_p=0.5)
            torch.autograd.grad(dropped.sum(), given)
        finally:
            registry_of_torch.restore_flash_attention_impl()
        assert len(calls) == 4
        results(given, **CALLS[name])
    assert len(calls) == 4


@pytest.mark.gpu
def test_varlen_attn_on_a_gpu(active, calls):
    given = [torch.randn(9, 4, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    cu = CU.cuda()
    out = varlen_attn(*given, cu, cu, 6, 6, window_size=(-1, 0))
    want = varlen_attention(*given, cu, mask=Causal())
    same([out], [want], rtol=0.05, atol=0.05)
    torch.autograd.grad(out.sum(), given)
    assert calls.count("backward") == 1
