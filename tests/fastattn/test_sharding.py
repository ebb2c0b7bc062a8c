"""Attention on DTensors: each rank its own part, the same numbers as on one; four ranks, threads of this process."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

from fastattn import KVCache, attention, attention_weights, ops, patch, scaled_dot_product_attention, varlen_attention
from fastattn.integrations.flash_attn import flash_attn_func
from fastattn.masks import Causal, Dense, Full, Lengths, Packed, Prefix, Segments, Window
from fastattn.nn import MultiheadAttention

WORLD = 4
WHOLE, BATCH, HEADS, LENGTH, WIDTH = Replicate(), Shard(0), Shard(1), Shard(2), Shard(3)
# how query, key and value lie on a 2 x 2 mesh: how the output lies
LAYOUTS = {
    "batch, heads": ((BATCH, HEADS), (BATCH, HEADS)),
    "heads, batch": ((HEADS, BATCH), (HEADS, BATCH)),
    "batch": ((BATCH, WHOLE), (BATCH, WHOLE)),
    "heads": ((WHOLE, HEADS), (WHOLE, HEADS)),
    "batch twice": ((BATCH, BATCH), (BATCH, WHOLE)),  # 2 items do not make 4 parts
    "width, batch": ((WIDTH, BATCH), (WHOLE, BATCH)),
    "whole": ((WHOLE, WHOLE), (WHOLE, WHOLE)),
}
TABLE = torch.rand(2, 4, 5, 5) > 0.3
MASKS = {
    "full": Full(),
    "window": Window(2, 0),
    "lengths": Causal() & Lengths(torch.tensor([3, 5]), q_lengths=torch.tensor([5, 4])),
    "one length": Lengths(torch.tensor([3])),
    "offset": Causal(offset=torch.tensor([0, 1])),
    "prefix": Prefix(torch.tensor([2, 4])),
    "segments": Segments(torch.tensor([[0, 0, 1, 1, -1], [0, 1, 1, 2, 2]])),
    "table": Dense(TABLE),
    "table of heads": Dense(TABLE[0]) & Lengths(torch.tensor([3, 5])),
    "table of rows": Dense(TABLE[0, 0]),
}


def tensors():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    bias, sinks = torch.randn(1, 4, 5, 5, generator=generator), torch.randn(4, generator=generator)
    return q, k, v, bias.requires_grad_(), sinks.requires_grad_()


def on_ranks(test):
    """Run a test on each rank, with a mesh of 2 x 2."""

    def run(self):
        test(self, init_device_mesh("cpu", (2, 2)))

    spawn_threads_and_init_comms(run, world_size=WORLD)(None)


def spread(tensor, mesh, places):
    """A rank's own copy: the ranks are threads, and what is sent to a replica is written in place."""
    return distribute_tensor(tensor.detach().clone(), mesh, places).requires_grad_(tensor.requires_grad)


def close(have, want):
    have = have.full_tensor() if isinstance(have, DTensor) else have
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    places, lies = LAYOUTS[name]
    q, k, v, bias, sinks = tensors()
    want, want_lse = attention(q, k, v, mask=MASKS["lengths"], bias=bias, sinks=sinks, return_lse=True)
    grads = torch.autograd.grad(want.square().sum() + want_lse.exp().sum(), (q, k, v, bias, sinks))

    def test(_, mesh):
        given = [spread(tensor, mesh, places) for tensor in (q, k, v)]
        added = spread(bias, mesh, (WHOLE, WHOLE)), sinks.detach().clone().requires_grad_()  # one of each kind
        out, lse = attention(*given, mask=MASKS["lengths"], bias=added[0], sinks=added[1], return_lse=True)
        assert out.placements == lse.placements == lies
        close(out, want), close(lse, want_lse)
        loss = (out * out).sum() + lse.exp().sum()
        for have, need in zip(torch.autograd.grad(loss, (*given, *added)), grads, strict=True):
            close(have, need)

    on_ranks(test)


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, monkeypatch):
    q, k, v, *_ = tensors()
    want, shapes, run = attention(q, k, v, mask=MASKS[name]), [], ops._run_forward
    monkeypatch.setattr(
        ops, "_run_forward", lambda spec, *rest: shapes.append((spec.batch, spec.num_heads)) or run(spec, *rest)
    )

    def test(_, mesh):
        close(attention(*(spread(each, mesh, (BATCH, HEADS)) for each in (q, k, v)), mask=MASKS[name]), want)

    on_ranks(test)
    assert shapes == [(1, 2)] * WORLD  # each rank computed its own part alone


@pytest.mark.parametrize("heads", ["all", "mean"])
@pytest.mark.parametrize("name", ["batch, heads", "heads", "width, batch"])
def test_weights(name, heads):
    places, lies = LAYOUTS[name]
    q, k, v, bias, _ = tensors()
    more = {"mask": MASKS["lengths"], "heads": heads, "rows": [0, -1]}
    _, lse = attention(q, k, v, mask=MASKS["lengths"], bias=bias, return_lse=True)
    want = attention_weights(q, k, bias=bias, **more)
    grads = torch.autograd.grad(want.square().sum(), (q, k))

    def test(_, mesh):
        given = [spread(tensor, mesh, places) for tensor in (q, k)]
        for known in (None, spread(lse, mesh, (WHOLE, WHOLE)), lse.detach()):
            have = attention_weights(*given, bias=bias.detach(), lse=known, **more)
            assert have.placements == tuple(WHOLE if heads == "mean" and lie == HEADS else lie for lie in lies)
            close(have, want)
        have = attention_weights(*given, bias=bias.detach(), **more)
        for mine, need in zip(torch.autograd.grad((have * have).sum(), given), grads, strict=True):
            close(mine, need)

    on_ranks(test)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_a_module_gives_its_weights(dropout):
    module = MultiheadAttention(8, 2, batch_first=True, dropout=dropout)
    x = torch.randn(2, 5, 8)
    want = module(x, x, x)

    def test(_, mesh):
        mine = distribute_module(copy.deepcopy(module), mesh)
        given = spread(x, mesh, (BATCH, WHOLE))
        for have, need in zip(mine(given, given, given), want, strict=True):
            close(have, need)

    on_ranks(test)


def test_blocks_are_refused():
    table = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)

    def test(_, mesh):
        pool, query = (spread(torch.randn(shape), mesh, (WHOLE, WHOLE)) for shape in ((2, 4, 2, 8), (2, 2, 1, 8)))
        cache = KVCache.from_blocks(pool, pool, table, [7, 5])
        with pytest.raises(ValueError, match="a cache in blocks cannot be of DTensors"):
            attention(query, cache.key, cache.value, mask=Causal())

    on_ranks(test)


def test_one_key_head_keeps_the_heads_together():
    q, k, *_ = tensors()
    one = k[:, :1]
    want = attention(q, one, one)

    def test(_, mesh):
        given = [spread(q, mesh, (BATCH, HEADS)), *(spread(one, mesh, (BATCH, WHOLE)) for _ in range(2))]
        out = attention(*given)
        assert out.placements == (BATCH, WHOLE)
        close(out, want)

    on_ranks(test)


def test_packed_sequences_and_dropout_are_whole():
    q, k, v, *_ = (tensor[:1] for tensor in tensors())
    packed, seed = Packed(torch.tensor([0, 2, 5]), torch.tensor([0, 1, 5])), torch.tensor([7])
    want = attention(q, k, v, mask=packed)
    dropped = attention(q, k, v, dropout_p=0.5, dropout_seed=seed)

    def test(_, mesh):
        given = [spread(tensor, mesh, (WHOLE, HEADS)) for tensor in (q, k, v)]
        close(attention(*given, mask=packed), want)
        out = attention(*given, dropout_p=0.5, dropout_seed=seed)
        assert out.placements == (WHOLE, WHOLE)
        close(out, dropped)

    on_ranks(test)


def test_torchs_function_and_a_backend_by_name():
    q, k, v, *_ = tensors()
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def test(_, mesh):
        given = [spread(tensor, mesh, (BATCH, HEADS)) for tensor in (q, k, v)]
        close(scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True), want)
        close(attention(*given, mask=Causal(), backend="reference"), want)
        with pytest.raises(ValueError, match="nearest: 'triton'"):
            attention(*given, backend="tritn")

    on_ranks(test)


def test_plain_tensors_among_them_are_refused():
    q, k, v, *_ = tensors()

    def test(_, mesh):
        for given in ((spread(q, mesh, (BATCH, HEADS)), k, v), (q, spread(k, mesh, (BATCH, HEADS)), v)):
            with pytest.raises(ValueError, match="query, key and value must all be DTensors on one mesh, got a Tensor"):
                attention(*given)

    on_ranks(test)


REFUSED = "a DTensor sharded over the length .* is refused, as fastattn has no context parallelism yet, got placements"


def patched(query, key, value):
    with patch():
        return F.scaled_dot_product_attention(query, key, value)


# call, and where batch, heads, length and width are in what it takes
CALLS = {
    "attention": (attention, (0, 1, 2, 3)),
    "torch's function": (scaled_dot_product_attention, (0, 1, 2, 3)),
    "patch()": (patched, (0, 1, 2, 3)),
    "patch(), one item": (lambda *given: patched(*(each.squeeze(0) for each in given)), (0, 1, 2, 3)),
    "weights": (lambda query, key, value: attention_weights(query, key), (0, 1, 2, 3)),
    "flash-attn": (flash_attn_func, (0, 2, 1, 3)),
    "packed": (
        lambda *given: varlen_attention(*(each.squeeze(0) for each in given), torch.tensor([0, 6])),
        (0, 2, 1, 3),
    ),
}


@pytest.mark.parametrize("which", ["all", "query", "key, value"])
@pytest.mark.parametrize("name", CALLS)
def test_a_sharded_length_is_refused(name, which):
    call, order = CALLS[name]
    shard = Shard(order.index(2))
    q, k, v = (torch.randn(1, 4, 6, 8).permute(order).contiguous() for _ in range(3))

    def test(_, mesh):
        places = {"all": (shard,) * 3, "query": (shard, WHOLE, WHOLE), "key, value": (WHOLE, shard, shard)}[which]
        given = [spread(each, mesh, (WHOLE, place)) for each, place in zip((q, k, v), places, strict=True)]
        with pytest.raises(ValueError, match=REFUSED):
            call(*given)
        whole = [each.redistribute(placements=(WHOLE, WHOLE)) for each in given]  # what the sentence says would work
        want = call(q, k, v)
        close(call(*whole), want)

    on_ranks(test)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_length_sharded_over_one_rank_is_whole(name, shape):
    """Where a dimension of the mesh has one rank, that one holds the whole length."""
    call, order = CALLS[name]
    q, k, v = (torch.randn(1, 4, 6, 8).permute(order).contiguous().requires_grad_() for _ in range(3))
    want = call(q, k, v)
    grads = torch.autograd.grad(want.square().sum(), (q, k))

    def test(_):
        mesh = init_device_mesh("cpu", shape)
        places = [Shard(order.index(2)) if size == 1 else Shard(order.index(1)) for size in shape]
        given = [spread(each, mesh, places) for each in (q, k, v)]
        have = call(*given)
        close(have, want)
        for mine, need in zip(torch.autograd.grad((have * have).sum(), given[:2]), grads, strict=True):
            close(mine, need)

    spawn_threads_and_init_comms(test, world_size=2)(None)


def test_a_module_on_a_sharded_length_is_refused():
    module, x = MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 4, 8)

    def test(_, mesh):
        mine = distribute_module(copy.deepcopy(module), mesh)
        given = spread(x, mesh, (WHOLE, Shard(1)))
        with pytest.raises(ValueError, match=REFUSED):
            mine(given, given, given, need_weights=False)

    on_ranks(test)


CONTEXT = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp, torch.nn.functional as F
import fastattn
from fastattn.integrations.flash_attn import flash_attn_func
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

def patched(q):
    with fastattn.patch():
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

def module(q):
    return fastattn.nn.MultiheadAttention(8, 2, batch_first=True)(q[:, 0], q[:, 0], q[:, 0])

def torchs_module(q):
    with fastattn.patch():
        return torch.nn.MultiheadAttention(8, 2, batch_first=True)(q[:, 0], q[:, 0], q[:, 0])

CALLS = {
    "patch()": patched,
    "attention": lambda q: fastattn.attention(q, q, q),
    "attention_weights": lambda q: fastattn.attention_weights(q, q),
    "explain": lambda q: fastattn.explain(q, q, q),
    "torch's function": lambda q: fastattn.scaled_dot_product_attention(q, q, q),
    "module": module,
    "torch's module": torchs_module,
    "flash-attn": lambda q: flash_attn_func(q, q, q),
    "compiled": torch.compile(lambda q: fastattn.attention(q, q, q), backend="eager"),
}

def rank(r, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(r), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    q = torch.randn(1, 2, 16, 8)
    CALLS["compiled"](q)
    with context_parallel(init_device_mesh("cpu", (2,)), buffers=[q], buffer_seq_dims=[2]):
        assert q.shape == (1, 2, 8, 8)
        for name, call in CALLS.items():
            try:
                call(q)
            except Exception as failure:
                assert "inside of torch.distributed.tensor.experimental.context_parallel" in str(failure), failure
                assert "leave this call to torch's own" in str(failure)
            else:
                raise SystemExit(f"{name} was answered")
    assert all(call(q) is not None for call in CALLS.values())
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1],), nprocs=2)
    print("refused")
"""


def test_context_parallel_is_refused(tmp_path, free_port):
    """Two processes: torch's context puts its function in the place of F.scaled_dot_product_attention in each."""
    (tmp_path / "context.py").write_text(CONTEXT)
    run = subprocess.run(
        [sys.executable, tmp_path / "context.py", str(free_port)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 and "refused" in run.stdout, run.stderr[-3000:]
