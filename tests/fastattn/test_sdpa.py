"""fastattn.scaled_dot_product_attention is torch's: numbers, gradients, layouts, errors."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fastattn.torch_api import sdpa as module
from fastattn.torch_api.sdpa import scaled_dot_product_attention

INF = float("inf")


def tensors(*shapes, dtype=torch.float64, grad=True):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


def same(ours, torchs, inputs, tolerance=1e-9):
    """Equal outputs and gradients of every input."""
    assert ours.shape == torchs.shape and ours.dtype == torchs.dtype
    torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance)
    d_out = torch.randn_like(torchs)
    wanted = torch.autograd.grad(torchs, inputs, d_out, allow_unused=True)
    for name, have, want in zip(
        "qkvm", torch.autograd.grad(ours, inputs, d_out, allow_unused=True), wanted, strict=False
    ):
        if want is None or have is None:  # torch says zeros or nothing where nothing is seen
            assert all(one is None or not one.any() for one in (have, want)), name
            continue
        torch.testing.assert_close(
            have, want, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"d{name}: {text}"
        )


SHAPES = {  # query, key, value, enable_gqa
    "no queries": ((2, 3, 0, 8), (2, 3, 5, 8), (2, 3, 5, 8), False),
    "no keys": ((2, 3, 4, 8), (2, 3, 0, 8), (2, 3, 0, 8), False),
    "no batch": ((0, 3, 4, 8), (0, 3, 5, 8), (0, 3, 5, 8), False),
    "no heads": ((2, 0, 4, 8), (2, 0, 5, 8), (2, 0, 5, 8), False),
    "head_dim 0": ((2, 3, 4, 0), (2, 3, 5, 0), (2, 3, 5, 8), False),
    "head_dim_v 0": ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 0), False),
    "length 1": ((2, 3, 1, 8), (2, 3, 1, 8), (2, 3, 1, 8), False),
    "4-D": ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), False),
    "2-D": ((4, 8), (5, 8), (5, 6), False),
    "3-D": ((3, 4, 8), (3, 5, 8), (3, 5, 8), False),
    "5-D": ((2, 2, 3, 4, 8), (2, 2, 3, 5, 8), (2, 2, 3, 5, 8), False),
    "6-D, length 1 dimensions": ((2, 1, 2, 3, 4, 8), (1, 3, 2, 3, 5, 8), (2, 3, 1, 1, 5, 8), False),
    "value wider": ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 11), False),
    "batch of key broadcasts": ((2, 3, 4, 8), (1, 3, 5, 8), (1, 3, 5, 8), False),
    "batch of query broadcasts": ((1, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), False),
    "one key head": ((2, 3, 4, 8), (2, 1, 5, 8), (2, 1, 5, 8), False),
    "one key head, all value heads": ((2, 3, 4, 8), (2, 1, 5, 8), (2, 3, 5, 8), False),
    "one query head": ((2, 1, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), False),
    "ranks differ": ((4, 3, 8), (2, 4, 6, 8), (2, 4, 6, 8), False),
    "gqa": ((2, 6, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8), True),
    "gqa 3-D": ((6, 4, 8), (2, 5, 8), (2, 5, 8), True),
    "gqa 5-D, batch broadcasts": ((2, 3, 6, 4, 8), (1, 3, 2, 5, 8), (2, 3, 2, 5, 8), True),
    "gqa, key 2 value 3 heads": ((2, 6, 4, 8), (2, 2, 5, 8), (2, 3, 5, 8), True),
    "mqa": ((2, 6, 4, 8), (2, 1, 5, 8), (2, 1, 5, 8), True),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_shapes(name, is_causal):
    *shapes, gqa = SHAPES[name]
    inputs = tensors(*shapes)
    arguments = {"is_causal": is_causal, "enable_gqa": gqa, "scale": 0.3}
    same(
        scaled_dot_product_attention(*inputs, **arguments), F.scaled_dot_product_attention(*inputs, **arguments), inputs
    )


def hidden_row(mask):
    mask[..., 1, :] = False
    return mask


MASKS = {  # shape of the mask, for query [2, 3, 4, 8], key [2, 3, 5, 8]
    "2-D": (4, 5),
    "a row of keys": (1, 5),
    "a column of queries": (4, 1),
    "3-D": (3, 4, 5),
    "padding": (2, 1, 1, 5),
    "heads": (1, 3, 4, 5),
    "all": (2, 3, 4, 5),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float", "learned"])
def test_masks(name, kind):
    torch.manual_seed(1)
    query, key, value = tensors((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8))
    shape = MASKS[name]
    mask = torch.rand(shape) < 0.6 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    if kind == "bool" and shape[-2] == 4:
        mask = hidden_row(mask)
    if kind == "float":
        mask = mask.masked_fill(mask < -0.5, -INF)
    mask.requires_grad_(kind == "learned")
    inputs = [query, key, value, *([mask] if kind == "learned" else [])]
    ours, torchs = (f(query, key, value, mask) for f in (scaled_dot_product_attention, F.scaled_dot_product_attention))
    same(ours, torchs, inputs)


@pytest.mark.parametrize(
    "shapes", [((4, 8), (5, 8), (4, 5)), ((3, 4, 8), (3, 5, 8), (3, 4, 5)), ((3, 4, 8), (3, 5, 8), (1, 5))]
)
def test_masks_of_lower_ranks(shapes):
    query, key = tensors(*shapes[:2])
    mask = torch.rand(shapes[2]) < 0.6
    same(
        scaled_dot_product_attention(query, key, key, mask),
        F.scaled_dot_product_attention(query, key, key, mask),
        [query, key],
    )


@pytest.mark.parametrize("lead", [(2, 2), (1, 2), (2, 1), (1, 1)], ids=str)
def test_mask_of_rank_5(lead):
    query, key = tensors((2, 2, 3, 4, 8), (2, 2, 3, 5, 8))
    mask = torch.rand(*lead, 1, 4, 5) < 0.7
    same(
        scaled_dot_product_attention(query, key, key, mask),
        F.scaled_dot_product_attention(query, key, key, mask),
        [query, key],
    )


def test_float32_mask_with_a_bfloat16_query():
    query, key = tensors((2, 3, 4, 8), (2, 3, 5, 8), dtype=torch.bfloat16)
    mask = torch.randn(4, 5, requires_grad=True)
    out = scaled_dot_product_attention(query, key, key, mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, key, mask), rtol=2e-2, atol=2e-2)
    assert torch.autograd.grad(out.sum(), mask)[0].dtype == torch.float32


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0, torch.tensor(0.5)], ids=str)
def test_scale(scale):
    inputs = tensors((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8))
    same(
        scaled_dot_product_attention(*inputs, scale=scale), F.scaled_dot_product_attention(*inputs, scale=scale), inputs
    )


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("lengths", [(4, 4), (4, 6), (6, 4)], ids=str)
def test_causal_bias_is_never_materialised(make, lengths, monkeypatch):
    query, key = tensors((2, 3, lengths[0], 8), (2, 3, lengths[1], 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bias = make(*lengths)
    torchs = F.scaled_dot_product_attention(query, key, key, bias)
    monkeypatch.setattr(type(bias), "_materialize", lambda *_: pytest.fail("the bias was materialised"))
    same(scaled_dot_product_attention(query, key, key, bias), torchs, [query, key])
    with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
        scaled_dot_product_attention(query, key, key, bias, is_causal=True)


def test_causal_bias_of_other_lengths():
    query, key = tensors((2, 3, 4, 8), (2, 3, 5, 8))
    with pytest.raises(RuntimeError, match="made for 3 queries and 9 keys, got 4 and 5"):
        scaled_dot_product_attention(query, key, key, causal_lower_right(3, 9))


def test_dropout_needs_no_training_flag():
    query, key = tensors((2, 3, 64, 8), (2, 3, 64, 8))
    value = torch.eye(64, dtype=torch.float64).expand(2, 3, 64, 64)  # the output is the weights
    whole = scaled_dot_product_attention(query, key, value)
    some = scaled_dot_product_attention(query, key, value, dropout_p=0.25)
    kept = some != 0
    assert 0.73 < kept.double().mean() < 0.77
    torch.testing.assert_close(some, torch.where(kept, whole / 0.75, 0.0))
    assert not scaled_dot_product_attention(query, key, value, dropout_p=1.0).any()
    torch.manual_seed(3)
    first = scaled_dot_product_attention(query, key, value, dropout_p=0.25)
    torch.manual_seed(3)
    assert torch.equal(first, scaled_dot_product_attention(query, key, value, dropout_p=0.25))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["heads first", "length first"])
def test_output_is_laid_out_like_the_query(order):
    query, key = tensors((2, 3, 4, 8), (2, 3, 5, 8))
    query = query.permute(order).contiguous().permute(order)
    want = F.scaled_dot_product_attention(query, key, key)
    assert scaled_dot_product_attention(query, key, key).stride() == want.stride()


def test_broadcast_inputs_are_not_copied(monkeypatch):
    seen = []
    attention = module.attention
    monkeypatch.setattr(
        module, "attention", lambda *args, **kwargs: seen.append((args, kwargs)) or attention(*args, **kwargs)
    )
    query, key = tensors((4, 3, 5, 8), (1, 3, 6, 8))
    scaled_dot_product_attention(query, key, key, torch.ones(1, 6, dtype=torch.bool))
    [((_, seen_key, _), arguments)] = seen
    assert seen_key.data_ptr() == key.data_ptr() and seen_key.stride(0) == 0
    assert arguments["mask"].shape == (1, 1, 1, 6)
    (query,) = tensors((2, 2, 3, 4, 8))
    scaled_dot_product_attention(query, query, query, torch.ones(1, 1, 3, 4, 4, dtype=torch.bool))
    assert seen[1][0][0].data_ptr() == query.data_ptr() and seen[1][1]["mask"].shape == (1, 3, 4, 4)


def test_autocast_casts_as_torch_does():
    query, key = tensors((2, 3, 4, 8), (2, 3, 5, 8), dtype=torch.float32)
    mask = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        ours = scaled_dot_product_attention(query, key.bfloat16(), key, mask)
        assert ours.dtype == F.scaled_dot_product_attention(query, key.bfloat16(), key, mask).dtype == torch.bfloat16
        assert scaled_dot_product_attention(query.double(), key.double(), key.double()).dtype == torch.float64


SELECTED = {
    "all": (list(SDPBackend.__members__.values())[1:5], None),
    "math": (SDPBackend.MATH, "reference"),
    "flash": (SDPBackend.FLASH_ATTENTION, None),
    "flash and math": ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], None),
    "efficient and math": ([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], "reference"),
}


@pytest.mark.parametrize("name", SELECTED)
def test_sdpa_kernel_is_heard(name, monkeypatch):
    seen = []
    attention = module.attention
    monkeypatch.setattr(
        module, "attention", lambda *args, **kwargs: seen.append(kwargs["backend"]) or attention(*args, **kwargs)
    )
    query, key = tensors((2, 3, 4, 8), (2, 3, 5, 8))
    with sdpa_kernel(SELECTED[name][0]):
        scaled_dot_product_attention(query, key, key)
    assert seen == [SELECTED[name][1]]


@pytest.mark.parametrize("kernels", [[], [SDPBackend.CUDNN_ATTENTION], [SDPBackend.EFFICIENT_ATTENTION]], ids=str)
def test_sdpa_kernel_that_nothing_satisfies(kernels):
    query, key = tensors((2, 3, 4, 8), (2, 3, 5, 8))
    with sdpa_kernel(kernels):
        complain(query, key, key)


def complain(*args, **kwargs):
    """Ours and torch's refuse with the same type and the same words."""
    with pytest.raises(Exception) as torchs:
        F.scaled_dot_product_attention(*args, **kwargs)
    with pytest.raises(torchs.type) as ours:
        scaled_dot_product_attention(*args, **kwargs)
    assert str(ours.value) == str(torchs.value)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 6, 8)
SAME_WORDS = {
    "dtypes differ": ((Q, K.double(), K), {}),
    "a scale with a gradient": ((Q, K, K), {"scale": torch.tensor(0.5, requires_grad=True)}),
    "a scale with a dimension": ((Q, K, K), {"scale": torch.tensor([0.5])}),
    "half and float": ((Q.half(), K.bfloat16(), K), {}),
    "devices differ": ((Q, K.to("meta"), K), {}),
    "rank 1": ((Q[0, 0, 0], K, K), {}),
    "mask float64": ((Q, K, K, torch.zeros(5, 6, dtype=torch.float64)), {}),
    "mask int64": ((Q, K, K, torch.zeros(5, 6, dtype=torch.int64)), {}),
    "mask uint8": ((Q, K, K, torch.zeros(5, 6, dtype=torch.uint8)), {}),
    "mask bfloat16": ((Q, K, K, torch.zeros(5, 6, dtype=torch.bfloat16)), {}),
    "mask rank 0": ((Q, K, K, torch.tensor(True)), {}),
    "mask rank 1": ((Q, K, K, torch.ones(6, dtype=torch.bool)), {}),
    "dropout 1.1": ((Q, K, K), {"dropout_p": 1.1}),
    "heads do not divide": ((Q, K[:, :3], K[:, :3]), {"enable_gqa": True}),
    "more key heads": ((Q[:, :2], K, K), {"enable_gqa": True}),
    "gqa without heads": ((Q[0, 0], K[0, 0], K[0, 0]), {"enable_gqa": True}),
    "enable_gqa None": ((Q, K, K), {"enable_gqa": None}),
    "is_causal None": ((Q, K, K), {"is_causal": None}),
    "dropout None": ((Q, K, K), {"dropout_p": None}),
    "scale str": ((Q, K, K), {"scale": "a"}),
    "query a list": (([1], K, K), {}),
    "mask a list": ((Q, K, K, [1]), {}),
    "seven positional": ((Q, K, K, None, 0.0, False, 1.0), {}),
}


@pytest.mark.parametrize("name", SAME_WORDS)
def test_errors_in_torchs_words(name):
    args, kwargs = SAME_WORDS[name]
    complain(*args, **kwargs)


SAME_TYPE = {  # torch's message is about an inner product; ours names the argument
    "heads differ": ((Q, K[:, :2], K[:, :2]), {}, "enable_gqa=True"),
    "batches differ": ((Q, torch.zeros(3, 4, 6, 8), torch.zeros(3, 4, 6, 8)), {}, "must broadcast"),
    "head_dim differs": ((Q, K[..., :4], K), {}, "last dimensions must be equal, got 8 and 4"),
    "mask too long": ((Q, K, K, torch.ones(5, 7)), {}, r"shape \[5, 7\] does not broadcast"),
    "mask rank 5": ((Q, K, K, torch.ones(1, 1, 1, 5, 6)), {}, "does not broadcast"),
    "mask of a larger batch": ((Q[:1], K[:1], K[:1], torch.ones(2, 4, 5, 6)), {}, "does not broadcast"),
    "complex": ((Q.cfloat(), K.cfloat(), K.cfloat()), {}, "got torch.complex64"),
    "int64": ((Q.long(), K.long(), K.long()), {}, "got torch.int64"),
    "float8": ([t.to(torch.float8_e4m3fn) for t in (Q, K, K)], {}, "got torch.float8_e4m3fn"),
    "dropout -0.1": ((Q, K, K), {"dropout_p": -0.1}, "between 0 and 1, but got -0.1"),
}


@pytest.mark.parametrize("name", SAME_TYPE)
def test_errors_of_torchs_type(name):
    args, kwargs, words = SAME_TYPE[name]
    with pytest.raises(Exception) as torchs:
        F.scaled_dot_product_attention(*args, **kwargs)
    with pytest.raises(torchs.type, match=words):
        scaled_dot_product_attention(*args, **kwargs)


def test_what_torch_does_not_look_at():
    with pytest.raises(RuntimeError, match="lengths must be equal, got 6 and 4"):
        scaled_dot_product_attention(Q, K, K[:, :, :4])
    with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set when is_causal=True"):
        scaled_dot_product_attention(Q, K, K, torch.ones(5, 6), is_causal=True)
    with pytest.raises(RuntimeError, match="attn_mask: it must be on the query's device cpu, got meta"):
        scaled_dot_product_attention(Q, K, K, torch.ones(5, 6, device="meta"))


def test_tensor_subclasses_come_back_as_they_went_in(monkeypatch):
    class Plain(torch.Tensor):
        pass

    class Knowing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                return "mine"
            return super().__torch_function__(func, types, args, kwargs or {})

    seen = []
    attention = module.attention
    monkeypatch.setattr(module, "attention", lambda *args, **kwargs: seen.append(args) or attention(*args, **kwargs))
    assert type(scaled_dot_product_attention(Q.as_subclass(Plain), K, K)) is Plain
    assert len(seen) == 1
    assert scaled_dot_product_attention(Q.as_subclass(Knowing), K, K) == "mine"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_tensors_stay_torchs():
    parts = [torch.randn(length, 4, 8) for length in (3, 5)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    for ours, torchs in zip(
        scaled_dot_product_attention(jagged, jagged, jagged).unbind(),
        F.scaled_dot_product_attention(jagged, jagged, jagged).unbind(),
        strict=True,
    ):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("grad, masked", list(itertools.product([False, True], repeat=2)))
def test_compiles_in_one_graph(grad, masked):
    query, key, value = tensors((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), grad=grad)
    mask = torch.rand(4, 5) < 0.7 if masked else None

    def model(query, key, value):
        return scaled_dot_product_attention(query, key, value, mask, is_causal=not masked)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(query, key, value), model(query, key, value)
    torch.testing.assert_close(ours, eager)
    if grad:
        same(ours, eager, [query, key, value])


@pytest.mark.parametrize(
    "scale", [float("nan"), float("inf"), -float("inf"), 1e39, torch.tensor(float("nan"))], ids=str
)
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match="scale: a finite number is needed"):
        scaled_dot_product_attention(Q, K, K, scale=scale)
