"""fastattn.multi_head_attention_forward is torch's: numbers, gradients, weights, dropout, errors."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from fastattn.dropout import dropout_mask
from fastattn.torch_api import mha as module
from fastattn.torch_api.mha import multi_head_attention_forward

BATCH, HEADS, WIDTH, QUERIES, KEYS = 3, 4, 24, 5, 7
HEAD_DIM = WIDTH // HEADS
INF = float("inf")


def problem(
    dtype=torch.float64, *, batch=BATCH, q_len=QUERIES, kv_len=KEYS, kdim=None, vdim=None, shared=None, bias=True
):
    """Positional arguments, keyword arguments and the leaves among them. `shared`: which of q, k, v are one tensor."""
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    query = leaf(q_len, batch, WIDTH)
    key = query if shared == "qkv" else leaf(kv_len, batch, kdim or WIDTH)
    value = key if shared in ("qkv", "kv") else leaf(kv_len, batch, vdim or WIDTH)
    separate = kdim is not None or vdim is not None
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    widths = (WIDTH, kdim or WIDTH, vdim or WIDTH)
    weights = {name: leaf(WIDTH, width) for name, width in zip(names, widths, strict=True)} if separate else {}
    packed = None if separate else leaf(3 * WIDTH, WIDTH)
    biases = (leaf(3 * WIDTH), leaf(WIDTH)) if bias else (None, None)
    out_weight = leaf(WIDTH, WIDTH)
    positional = [query, key, value, WIDTH, HEADS, packed, biases[0], None, None, False, 0.0, out_weight, biases[1]]
    leaves = [
        t
        for t in (*dict.fromkeys((query, key, value)), packed, *biases, out_weight, *weights.values())
        if t is not None
    ]
    return positional, {"use_separate_proj_weight": separate, **weights}, leaves


def both(positional, keyword, leaves, tolerance=1e-9):
    """Outputs, weights and all gradients, through the output and through the weights, as torch's."""
    (ours, our_weights), (torchs, torch_weights) = (
        f(*positional, **keyword) for f in (multi_head_attention_forward, F.multi_head_attention_forward)
    )
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(ours, torchs, **close)
    assert (our_weights is None) == (torch_weights is None)
    pairs = [(ours, torchs)]
    if our_weights is not None:
        torch.testing.assert_close(our_weights, torch_weights, **close)
        pairs += [(our_weights, torch_weights)] if torch_weights.numel() else []
    for mine, theirs in pairs:
        grad = torch.randn_like(theirs)
        have = torch.autograd.grad(mine, leaves, grad, retain_graph=True, allow_unused=True)
        want = torch.autograd.grad(theirs, leaves, grad, retain_graph=True, allow_unused=True)
        for index, (one, other) in enumerate(zip(have, want, strict=True)):
            other = torch.zeros_like(leaves[index]) if other is None else other
            one = torch.zeros_like(leaves[index]) if one is None else one
            torch.testing.assert_close(one, other, **close, msg=lambda text, index=index: f"leaf {index}: {text}")


def bool_mask(*shape):
    """True = hidden; no row hides everything."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


ATTN_MASKS = {
    "none": lambda: None,
    "bool": lambda: bool_mask(QUERIES, KEYS),
    "bool per head": lambda: bool_mask(BATCH * HEADS, QUERIES, KEYS),
    "float": lambda: torch.zeros(QUERIES, KEYS, dtype=torch.float64).masked_fill(bool_mask(QUERIES, KEYS), -INF),
    "learned per head": lambda: torch.randn(BATCH * HEADS, QUERIES, KEYS, dtype=torch.float64).requires_grad_(),
}
PADDINGS = {
    "none": lambda: None,
    "bool": lambda: bool_mask(BATCH, KEYS),
    "float": lambda: torch.randn(BATCH, KEYS, dtype=torch.float64),
    "learned": lambda: torch.randn(BATCH, KEYS, dtype=torch.float64).requires_grad_(),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("weights", ["no weights", "mean", "per head"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("attn_mask", ATTN_MASKS)
def test_masks(attn_mask, padding, weights):
    positional, keyword, leaves = problem()
    masks = {"attn_mask": ATTN_MASKS[attn_mask](), "key_padding_mask": PADDINGS[padding]()}
    leaves += [mask for mask in masks.values() if mask is not None and mask.requires_grad]
    weights = {"need_weights": weights != "no weights", "average_attn_weights": weights == "mean"}
    both(positional, {**keyword, **masks, **weights}, leaves)


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("shared", ["qkv", "kv", "none"])
def test_packed_projections(shared, bias):
    both(*problem(shared=shared, bias=bias, kv_len=QUERIES if shared == "qkv" else KEYS))


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("dims", [(10, 14), (10, None), (WIDTH, WIDTH)], ids=str)
def test_separate_projections(dims, bias):
    both(*problem(kdim=dims[0], vdim=dims[1], bias=bias))


@pytest.mark.parametrize("sizes", [{"q_len": 0}, {"kv_len": 0}, {"batch": 0}, {"q_len": 1, "kv_len": 1}], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_empty_and_short(sizes, need_weights):
    positional, keyword, leaves = problem(**sizes)
    both(positional, {**keyword, "need_weights": need_weights}, leaves)


@pytest.mark.parametrize("mask", ["no mask", "attn_mask", "both"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero_attn"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias_kv"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_added_keys(biased, zero, need_weights, mask):
    positional, keyword, leaves = problem()
    if biased:
        added = [torch.randn(1, 1, WIDTH, dtype=torch.float64).requires_grad_() for _ in range(2)]
        positional[7:9], leaves = added, leaves + added
    positional[9] = zero
    if mask != "no mask":
        keyword["attn_mask"] = bool_mask(BATCH * HEADS, QUERIES, KEYS)
    if mask == "both":
        keyword["key_padding_mask"] = bool_mask(BATCH, KEYS)
    both(positional, {**keyword, "need_weights": need_weights}, leaves)


@pytest.mark.parametrize("which", [("static_k",), ("static_v",), ("static_k", "static_v")], ids=str)
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero_attn"])
def test_static_keys_and_values(which, zero):
    positional, keyword, leaves = problem()
    positional[9] = zero
    static = {name: torch.randn(BATCH * HEADS, KEYS, HEAD_DIM, dtype=torch.float64).requires_grad_() for name in which}
    both(positional, {**keyword, **static}, [*leaves, *static.values()])


def test_static_keys_of_another_length():
    positional, keyword, leaves = problem()
    shape = (BATCH * HEADS, KEYS + 2, HEAD_DIM)
    static = {name: torch.randn(shape, dtype=torch.float64).requires_grad_() for name in ("static_k", "static_v")}
    keyword["key_padding_mask"] = bool_mask(BATCH, KEYS + 2)
    both(positional, {**keyword, **static}, [*leaves, *static.values()])


@pytest.mark.parametrize("mask", ["none", "bool", "per head", "padding"])
@pytest.mark.parametrize("average", [True, False])
def test_unbatched(mask, average):
    positional, keyword, leaves = problem(batch=1)
    positional[:3] = [tensor.squeeze(1) for tensor in positional[:3]]
    leaves[:3] = positional[:3]
    if mask == "padding":
        keyword["key_padding_mask"] = bool_mask(KEYS)
    elif mask != "none":
        keyword["attn_mask"] = bool_mask(*([HEADS] if mask == "per head" else []), QUERIES, KEYS)
    both(positional, {**keyword, "average_attn_weights": average}, leaves)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("right", [True, False], ids=["right hint", "wrong hint"])
def test_causal_hint_is_resolved_as_torch_does(right, need_weights, padded):
    positional, keyword, leaves = problem()
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1) if right else bool_mask(QUERIES, KEYS)
    keyword |= {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    if padded:
        keyword["key_padding_mask"] = bool_mask(BATCH, KEYS)
    both(positional, keyword, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_weights", [False, True])
def test_dtypes(dtype, need_weights):
    positional, keyword, _ = problem(dtype)
    keyword |= {"key_padding_mask": bool_mask(BATCH, KEYS), "need_weights": need_weights}
    ours, torchs = (f(*positional, **keyword) for f in (multi_head_attention_forward, F.multi_head_attention_forward))
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for mine, theirs in zip(ours, torchs, strict=True):
        if theirs is not None:
            scale = theirs.abs().max().item()
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * scale)


def test_rows_without_a_visible_key_give_zero():
    positional, keyword, leaves = problem(bias=False)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1] = True
    out, weights = multi_head_attention_forward(*positional, **keyword, key_padding_mask=padding)
    assert not out[:, 1].any() and not weights[1].any() and out[:, 0].all()
    for grad in torch.autograd.grad((out.sum(), weights.square().sum()), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("average", [True, False])
def test_weights_hold_the_dropout_that_made_the_output(average):
    positional, keyword, leaves = problem(bias=False)
    positional[10] = 0.4
    torch.manual_seed(5)
    out, weights = multi_head_attention_forward(*positional, **keyword, average_attn_weights=average)
    torch.manual_seed(5)
    kept = dropout_mask(BATCH, HEADS, QUERIES, KEYS, p=0.4, seed=module.new_dropout_seed(out.device))
    positional[10] = 0.0
    whole = multi_head_attention_forward(*positional, **keyword, average_attn_weights=False)[1]
    per_head = whole * kept / 0.6
    torch.testing.assert_close(weights, per_head.mean(1) if average else per_head)
    value, packed, out_weight = positional[2], positional[5], positional[11]
    v = F.linear(value, packed[2 * WIDTH :]).view(KEYS, BATCH, HEADS, HEAD_DIM)
    want = F.linear(torch.einsum("bhqk,kbhd->qbhd", per_head, v).flatten(2), out_weight)
    torch.testing.assert_close(out, want)
    for one, other in zip(*(torch.autograd.grad(each.sum(), leaves) for each in (out, want)), strict=True):
        torch.testing.assert_close(one, other)


def test_no_dropout_out_of_training():
    positional, keyword, leaves = problem()
    positional[10] = 0.9
    both(positional, {**keyword, "training": False}, leaves)


def test_dropout_of_everything():
    positional, keyword, _ = problem(bias=False)
    positional[10] = 1.0
    assert not any(each.any() for each in multi_head_attention_forward(*positional, **keyword))


def test_bool_masks_reach_attention_as_they_are(monkeypatch):
    """No tensor of the size batch x heads x q_len x kv_len is made from a padding mask and an attention mask."""
    seen = []
    attention = module.attention
    monkeypatch.setattr(module, "attention", lambda *args, **kwargs: seen.append(kwargs) or attention(*args, **kwargs))
    positional, keyword, _ = problem()
    keyword |= {
        "attn_mask": bool_mask(QUERIES, KEYS),
        "key_padding_mask": bool_mask(BATCH, KEYS),
        "need_weights": False,
    }
    multi_head_attention_forward(*positional, **keyword)
    [call] = seen
    assert call["bias"] is None
    assert [tuple(part.table.shape) for part in call["mask"].conjuncts()] == [
        (1, 1, QUERIES, KEYS),
        (BATCH, 1, 1, KEYS),
    ]


def test_mismatched_masks_warn_as_in_torch():
    positional, keyword, _ = problem()
    keyword |= {"attn_mask": torch.zeros(QUERIES, KEYS), "key_padding_mask": bool_mask(BATCH, KEYS)}
    with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated"):
        multi_head_attention_forward(*positional, **keyword)
    keyword["attn_mask"] = bool_mask(QUERIES, KEYS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multi_head_attention_forward(*positional, **keyword)


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


BOOL = torch.bool
ERRORS = {  # name: change of the positional arguments, keyword arguments
    "query 4-D": ({0: zeros(1, 5, 3, 24)}, {}),
    "key 2-D": ({1: zeros(7, 24)}, {}),
    "unbatched, key 3-D": ({0: zeros(5, 24)}, {}),
    "padding 1-D": ({}, {"key_padding_mask": zeros(7, dtype=BOOL)}),
    "attn_mask 4-D": ({}, {"attn_mask": zeros(3, 4, 5, 7)}),
    "attn_mask 1-D": ({}, {"attn_mask": zeros(7)}),
    "attn_mask 2-D of a wrong shape": ({}, {"attn_mask": zeros(5, 6)}),
    "attn_mask 3-D of a wrong shape": ({}, {"attn_mask": zeros(3, 5, 7)}),
    "attn_mask int": ({}, {"attn_mask": zeros(5, 7, dtype=torch.int64)}),
    "padding uint8": ({}, {"key_padding_mask": zeros(3, 7, dtype=torch.uint8)}),
    "padding too short": ({}, {"key_padding_mask": zeros(3, 6, dtype=BOOL)}),
    "padding for another batch": ({}, {"key_padding_mask": zeros(2, 7, dtype=BOOL)}),
    "padding too short, added keys": ({9: True}, {"key_padding_mask": zeros(3, 6, dtype=BOOL)}),
    "hint without a mask": ({}, {"is_causal": True}),
    "embed_dim": ({3: 32}, {}),
    "heads do not divide": ({4: 5}, {}),
    "key and value differ": ({2: zeros(6, 3, 24)}, {}),
    "no packed weight": ({5: None}, {}),
    "no separate weights": ({}, {"use_separate_proj_weight": True}),
    "separate, lengths differ": ({2: zeros(6, 3, 24)}, {"use_separate_proj_weight": True}),
    "bias_k alone": ({7: zeros(1, 1, 24)}, {}),
    "bias_v alone": ({8: zeros(1, 1, 24)}, {}),
    "bias and static key": ({7: zeros(1, 1, 24), 8: zeros(1, 1, 24)}, {"static_k": zeros(12, 7, 6)}),
    "bias and static value": ({7: zeros(1, 1, 24), 8: zeros(1, 1, 24)}, {"static_v": zeros(12, 7, 6)}),
    "static key for other heads": ({}, {"static_k": zeros(11, 7, 6)}),
    "static value of another width": ({}, {"static_v": zeros(12, 7, 5)}),
    "dropout, with weights": ({10: 1.5}, {}),
    "dropout, without": ({10: 1.5}, {"need_weights": False}),
    "mask float32 of half queries": ({}, {"attn_mask": zeros(5, 7, dtype=torch.bfloat16), "need_weights": False}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_torchs(name):
    changes, keyword = ERRORS[name]
    positional, defaults, _ = problem()
    for place, value in changes.items():
        positional[place] = value
    with pytest.raises(Exception) as torchs:
        F.multi_head_attention_forward(*positional, **{**defaults, **keyword})
    with pytest.raises(torchs.type) as ours:
        multi_head_attention_forward(*positional, **{**defaults, **keyword})
    assert str(ours.value) == str(torchs.value)


def test_unequal_static_lengths_are_refused():
    positional, keyword, _ = problem()
    with pytest.raises(RuntimeError, match="lengths of keys and values must be equal, got 9 and 7"):
        multi_head_attention_forward(*positional, **keyword, static_k=zeros(12, 9, 6), static_v=zeros(12, 7, 6))


def test_tensor_subclasses_get_their_word():
    class Knowing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is F.multi_head_attention_forward:
                return "mine", None
            return super().__torch_function__(func, types, args, kwargs or {})

    class Plain(torch.Tensor):
        pass

    positional, keyword, _ = problem()
    query = positional[0].detach()
    positional[0] = query.as_subclass(Knowing)
    assert multi_head_attention_forward(*positional, **keyword)[0] == "mine"
    positional[0] = query.as_subclass(Plain)
    assert type(multi_head_attention_forward(*positional, **keyword)[0]) is Plain
