"""What people have kept on disk: pickles of masks, specs, caches, modules, replaced models, and exported programs.

`VALUES` and `PROGRAMS` make each as today's code does. make.py has kept them as an earlier version wrote them, in
`pickles/` and `programs/`; test_surface.py loads those and compares. Numbers are exact in float32, and none is drawn.
"""

import dataclasses
import functools
import io
import pickle
from pathlib import Path

import torch
from torch import nn

import fastattn
from fastattn import masks
from fastattn.cache import KVCache
from fastattn.integrations.torch import replace_attention
from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Packed, Prefix, Segments, Window
from fastattn.masks.paged import Paged
from fastattn.scores import DotProduct, Softmax
from fastattn.spec import AttnInputs, AttnSpec

HERE = Path(__file__).resolve().parent
PICKLES, EXPORTED = HERE / "pickles", HERE / "programs"
PROTOCOL = 4
BACKEND = "reference"


def numbers(*shape):
    """Small multiples of 1/16, a different one for neighbours."""
    count = torch.Size(shape).numel()
    return (((torch.arange(count) * 7) % 13 - 6) / 16).reshape(shape)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def qkv(q_len=3, kv_len=5):
    return numbers(2, 2, q_len, 4), numbers(2, 2, kv_len, 4), numbers(2, 2, kv_len, 4) + 0.25


# ---- masks: 2 items, 2 heads, 3 queries, 5 keys

MASKS = {
    "full": Full,
    "causal": Causal,
    "causal-offsets": lambda: Causal(offset=ints(1, 2)),
    "window": lambda: Window(1, 0, align="top-left"),
    "chunked": lambda: Chunked(2, 1),
    "lengths": lambda: Lengths(ints(5, 2), ints(3, 1), ints(0, 1)),
    "prefix": lambda: Prefix(ints(2, 1)),
    "segments": lambda: Segments(ints([0, 0, 1], [0, 1, 1]), ints([0, 0, 0, 1, 1], [0, 1, 1, 2, 2])),
    "packed": lambda: Packed(ints(0, 1, 3), ints(0, 2, 5)),
    "dense": lambda: Dense(numbers(2, 1, 3, 5) > 0),
    "and": lambda: Causal() & Lengths(ints(5, 2)),
    "or": lambda: Window(0, 0) | Prefix(ints(2, 1)) & Full(),
    "paged": lambda: Paged(Causal() & Lengths(ints(5, 2)), ints([0, 2], [1, 3]), 4),
}  # fmt: skip


def same_mask(loaded, made):
    """Masks that hold tensors are equal where those are the same object, so that a loaded one never is."""
    assert type(loaded) is type(made) and repr(loaded) == repr(made)
    for each in dataclasses.fields(made):
        same_part(getattr(loaded, each.name), getattr(made, each.name))
    assert torch.equal(loaded.dense(3, 5), made.dense(3, 5))


def same_part(loaded, made):
    if isinstance(made, masks.Mask):
        same_mask(loaded, made)
    elif isinstance(made, torch.Tensor):
        same_tensor(loaded, made)
    elif isinstance(made, list | tuple):
        assert type(loaded) is type(made) and len(loaded) == len(made)
        for parts in zip(loaded, made, strict=True):
            same_part(*parts)
    else:
        assert loaded == made


# ---- specs, verdicts, scores


def inputs():
    query, key, value = qkv()
    return AttnInputs(query, key, value, numbers(1, 2, 3, 5), numbers(2))


def spec():
    return AttnSpec.of(inputs(), mask=Causal() & Lengths(ints(5, 2)), softcap=8.0)


def same_fields(loaded, made):
    assert type(loaded) is type(made)
    values = made._asdict() if isinstance(made, tuple) else vars(made)
    found = loaded._asdict() if isinstance(made, tuple) else vars(loaded)
    assert list(found) == list(values)
    for name, value in values.items():
        same_part(found[name], value)


def same_value(loaded, made):
    assert type(loaded) is type(made) and loaded == made


def functions():
    """By reference: the places where they were found."""
    return [
        fastattn.attention, fastattn.attention_weights, fastattn.dropout_mask, fastattn.explain,
        fastattn.varlen_attention, fastattn.scaled_dot_product_attention, fastattn.multi_head_attention_forward,
        fastattn.replace_attention, fastattn.KVCache, fastattn.Verdict, fastattn.BackendUnavailable, fastattn.patch,
        masks.Mask, masks.visible_pairs,
    ]  # fmt: skip


def verdict():
    """A table with the same words on every machine."""
    reasons = {"cpu": "no compiler", "cuda": "no GPU", "triton": "no GPU", "reference": None}
    return fastattn.Verdict(BACKEND, BACKEND, ("plain PyTorch",) * 2, reasons, dict(reasons), ["a note"])


# ---- caches: two tokens are in, two more come


def paged():
    return KVCache.paged(2, 2, 4, blocks=4, block_size=4)


def foreign():
    pool = numbers(4, 4, 2, 4)  # blocks, tokens of a block, heads, head_dim
    return KVCache.from_blocks(pool, pool + 1, ints([0, 2], [1, 3]), [3, 2])


def filled(make):
    def make_filled():
        cache = make()
        cache.update(numbers(2, 2, 2, 4), numbers(2, 2, 2, 4) + 0.5)
        return cache

    return make_filled


def same_cache(loaded, made, writable=True):
    assert type(loaded) is type(made) and repr(loaded) == repr(made) and loaded.kv_len == made.kv_len
    query, key, value = qkv(2, 2)
    if writable:
        found, expected = (cache.update(key, value) for cache in (loaded, made))
    else:
        found, expected = ((cache.key, cache.value) for cache in (loaded, made))
    outs = [fastattn.attention(query, *views, mask=Causal(), backend=BACKEND) for views in (found, expected)]
    assert torch.equal(*outs)


def views():
    cache = filled(paged)()
    return cache.key, cache.value


def same_views(loaded, made):
    assert repr(loaded) == repr(made)
    outs = [fastattn.attention(numbers(2, 2, 2, 4), *each, mask=Causal(), backend=BACKEND) for each in (loaded, made)]
    assert torch.equal(*outs)


# ---- modules


def exact(module):
    """Every parameter set, in evaluation."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(numbers(*parameter.shape))
    return module.eval()


SIZES = {"d_model": 4, "nhead": 2, "dim_feedforward": 4, "batch_first": True, "backend": BACKEND}
MODULES = {
    "attention": lambda: fastattn.nn.MultiheadAttention(4, 2, batch_first=True, backend=BACKEND, window=(1, 0)),
    "attention-kv": lambda: fastattn.nn.MultiheadAttention(
        4, 2, kdim=4, vdim=4, add_bias_kv=True, add_zero_attn=True, batch_first=True, backend=BACKEND
    ),
    "encoder-layer": lambda: fastattn.nn.TransformerEncoderLayer(**SIZES),
    "decoder-layer": lambda: fastattn.nn.TransformerDecoderLayer(**SIZES),
    "encoder": lambda: fastattn.nn.TransformerEncoder(
        fastattn.nn.TransformerEncoderLayer(**SIZES), 1, enable_nested_tensor=False
    ),
    "decoder": lambda: fastattn.nn.TransformerDecoder(fastattn.nn.TransformerDecoderLayer(**SIZES), 1),
    "transformer": lambda: fastattn.nn.Transformer(4, 2, 1, 1, 4, batch_first=True, backend=BACKEND),
}


def module(make):
    return lambda: exact(make())


def result(of):
    x = numbers(2, 3, 4)
    if isinstance(of, nn.MultiheadAttention):
        return torch.cat([each.flatten() for each in of(x, x, x)])
    return (
        of(x, x + 0.125)
        if isinstance(of, nn.TransformerDecoder | nn.TransformerDecoderLayer | nn.Transformer)
        else of(x)
    )


def same_module(loaded, made):
    assert type(loaded) is type(made) and repr(loaded) == repr(made)
    found, expected = loaded.state_dict(), made.state_dict()
    assert list(found) == list(expected) and all(map(torch.equal, found.values(), expected.values()))
    with torch.no_grad():
        assert torch.equal(result(loaded), result(made))


def torchs():
    layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    return exact(nn.TransformerEncoder(layer, 1, enable_nested_tensor=True))


def replaced():
    """A model of torch's after replace_attention, and its report beside it."""
    model = torchs()
    return model, replace_attention(model, backend=BACKEND)


def same_replaced(loaded, made):
    (model, report), (made_model, made_report) = loaded, made
    same_module(model, made_model)
    assert type(report) is type(made_report)
    assert [(row.path, row.changed) for row in report.rows] == [(row.path, row.changed) for row in made_report.rows]
    assert len(report) == 1 and type(model.layers[0].self_attn) is fastattn.nn.MultiheadAttention
    report.restore()
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention and model.use_nested_tensor


VALUES = (
    {f"mask-{name}": (make, same_mask) for name, make in MASKS.items()}
    | {
        "inputs": (inputs, same_fields),
        "spec": (spec, same_fields),
        "spec-flat": (lambda: spec().flat(), same_fields),
        "verdict": (verdict, same_value),
        "score": (DotProduct, same_value),
        "normalizer": (Softmax, same_value),
        "functions": (functions, same_value),
        "cache-static": (filled(lambda: KVCache.static(2, 2, 6, 4)), same_cache),
        "cache-growing": (filled(lambda: KVCache.growing(2, 2, 4)), same_cache),
        "cache-sliding": (filled(lambda: KVCache.sliding(2, 2, 3, 4)), same_cache),
        "cache-paged": (filled(paged), same_cache),
        "cache-foreign-blocks": (foreign, functools.partial(same_cache, writable=False)),
        "cache-views": (views, same_views),
        "replaced": (replaced, same_replaced),
    }
    | {f"module-{name}": (module(make), same_module) for name, make in MODULES.items()}
)
"""name: (what makes the value today, what compares a loaded one with it)."""


def same_tensor(loaded, made):
    assert loaded.dtype == made.dtype and torch.equal(loaded, made)


# ---- exported programs


class Attends(nn.Module):
    """A call with a mask."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, query, key, value):
        out, lse = fastattn.attention(query, key, value, mask=self.make(), backend=BACKEND, return_lse=True)
        return torch.cat([out, lse.unsqueeze(-1)], -1)


class Padded(nn.Module):
    """A call with a mask that holds a tensor."""

    def forward(self, query, key, value, lengths):
        return fastattn.attention(query, key, value, mask=Causal() & Lengths(lengths, validate=False), backend=BACKEND)


PROGRAMS = {
    "attention-causal": lambda: (Attends(Causal), qkv()),
    "attention-window": lambda: (Attends(lambda: Window(1, 0) | Chunked(2)), qkv()),
    "attention-lengths": lambda: (Padded(), (*qkv(), ints(5, 2))),
    "multihead-attention": lambda: (
        exact(fastattn.nn.MultiheadAttention(4, 2, batch_first=True)),
        (numbers(2, 3, 4),) * 3,
    ),
}


def exported(name):
    """A program's bytes, without the places in files that torch notes beside each operation."""
    model, arguments = PROGRAMS[name]()
    program = torch.export.export(model.eval(), arguments)
    for graph in (each for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)):
        for node in graph.graph.nodes:
            for key in ("stack_trace", "source_fn_stack", "torch_fn", "from_node"):
                node.meta.pop(key, None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def pickled(name):
    """A value's bytes. What a cache has not written yet is NaN in them, not what lay in memory."""
    torch.use_deterministic_algorithms(True)
    try:
        return pickle.dumps(VALUES[name][0](), protocol=PROTOCOL)
    finally:
        torch.use_deterministic_algorithms(False)
