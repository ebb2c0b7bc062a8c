"""Attention on DTensors: each rank its own part, the same numbers as on one; four ranks, threads of this process."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

from fastattn import KVCache, attention, attention_weights, ops, scaled_dot_product_attention
from fastattn.masks import Causal, Dense, Full, Lengths, Packed, Prefix, Segments, Window
from fastattn.nn import MultiheadAttention

WORLD = 4
WHOLE, BATCH, HEADS, ROWS = Replicate(), Shard(0), Shard(1), Shard(2)
# how query, key and value lie on a 2 x 2 mesh: how the output lies
LAYOUTS = {
    "batch, heads": ((BATCH, HEADS), (BATCH, HEADS)),
    "heads, batch": ((HEADS, BATCH), (HEADS, BATCH)),
    "batch": ((BATCH, WHOLE), (BATCH, WHOLE)),
    "heads": ((WHOLE, HEADS), (WHOLE, HEADS)),
    "batch twice": ((BATCH, BATCH), (BATCH, WHOLE)),  # 2 items do not make 4 parts
    "rows, batch": ((ROWS, BATCH), (WHOLE, BATCH)),
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
@pytest.mark.parametrize("name", ["batch, heads", "heads", "rows, batch"])
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


def test_torchs_function_and_a_room_by_name():
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
