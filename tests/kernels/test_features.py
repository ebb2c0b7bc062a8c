"""The Triton backend, feature by feature: biases, sinks, soft caps, dropout, widths, strides, gradients, nothing."""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastattn import attention, dropout_mask, explain
from fastattn.kernels.host import launch
from fastattn.kernels.host.tensor_arguments import TensorDescriptor
from fastattn.masks import Causal, Dense, Full, Lengths, Window
from fastattn.testing import Case, check_close, make_inputs, poison, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
B, H, Q, K = 2, 2, 19, 23
"""Two tiles of queries and two of keys in the interpreter, the last ones not full."""


def problem_of(name="case", q_len=Q, kv_len=K, **fields):
    """Two batch items, two query heads of one key head, 16 wide."""
    sizes = {"batch": B, "num_heads": H, "num_kv_heads": H // 2, "head_dim": 16}
    return make_inputs(Case(name, q_len, kv_len, **(sizes | fields)), DEVICE)


def with_inputs(problem, **tensors):
    return dataclasses.replace(problem, inputs=problem.inputs._replace(**tensors))


def check(problem):
    """Forward and every gradient against float64; the results."""
    results = run(problem, "triton")
    wanted = ("bias", "sinks")
    assert {f"d{name}" for name in wanted if getattr(problem.inputs, name) is not None} <= set(results)
    check_close(problem, results)
    return results


def same(want, got):
    """The bits, in the interpreter; on a device other strides are another kernel, whose compiler may fuse otherwise."""
    if DEVICE == "cpu":
        assert [name for name in want if not torch.equal(want[name], got[name])] == []


def hidden(mask):
    return lambda case, device: mask


# ---- bias

BROADCAST = {
    "-".join(n for n, own in zip(("batch", "heads", "queries", "keys"), owned, strict=True) if own) or "one": owned
    for owned in itertools.product((True, False), repeat=4)
}


@pytest.mark.parametrize("owned", BROADCAST.values(), ids=BROADCAST)
def test_a_bias_of_any_broadcast_shape(owned):
    """Its own axes are named; the gradient is summed over the others."""
    shape = tuple(size if own else 1 for size, own in zip((B, 4, Q, K), owned, strict=True))
    problem = problem_of(num_heads=4, bias=shape, mask=hidden(Causal()), dtype=torch.float32)
    assert check(problem)["dbias"].shape == shape


@pytest.mark.parametrize("shape", [(), (1,), (K,), (1, K), (Q, 1), (Q, K), (H, 1, 1), (H, Q, 1), (H, 1, K)], ids=str)
def test_a_bias_of_fewer_dimensions(shape):
    assert check(problem_of(bias=shape))["dbias"].shape == shape


@pytest.mark.parametrize("bias_dtype", ["float32", "own"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(Q, K), (B, 1, 1, K), (H, Q, 1)], ids=str)
def test_a_gradient_of_a_bias_has_its_dtype(shape, dtype, bias_dtype):
    bias_dtype = torch.float32 if bias_dtype == "float32" else dtype
    assert check(problem_of(bias=shape, dtype=dtype, bias_dtype=bias_dtype))["dbias"].dtype == bias_dtype


def minus_infinity(problem, where):
    """The problem with -inf in its bias."""
    bias = problem.inputs.bias.clone()
    bias[where] = -torch.inf
    return with_inputs(problem, bias=bias)


@pytest.mark.parametrize(
    "where",
    [(..., slice(3, 9)), (..., slice(5, 8), slice(None)), (0, 1), (slice(None), slice(None), 4, 7), ...],
    ids=["keys", "queries", "a-head", "an-element", "everything"],
)
def test_minus_infinity_in_a_bias_hides_and_gets_no_gradient(where):
    problem = minus_infinity(problem_of(bias=(B, H, Q, K), mask=hidden(Window(9, 9))), where)
    results = check(problem)
    bias = problem.inputs.bias
    assert (results["dbias"][bias == -torch.inf] == 0).all()
    nobody = (bias == -torch.inf).all(-1)
    assert (results["out"][nobody] == 0).all() and (results["lse"][nobody] == -torch.inf).all()


@pytest.mark.parametrize("shape", [(K,), (Q, 1), (1, 1)], ids=str)
def test_minus_infinity_in_a_bias_without_all_axes(shape):
    problem = minus_infinity(problem_of(bias=shape), slice(4, 17) if max(shape) > 1 else ...)
    results = check(problem)
    assert (results["dbias"][problem.inputs.bias == -torch.inf] == 0).all()


def test_a_bias_that_lies_anyhow_in_memory():
    """Transposed, every second element, one table for all heads by a stride of 0."""
    problem = problem_of(bias=(B, H, Q, K))
    bias = problem.inputs.bias
    strange = torch.randn(B, K, 2 * Q, device=DEVICE)[:, :, ::2].mT[:, None].expand(-1, H, -1, -1)
    for each in (bias.mT.contiguous().mT, strange):
        check(with_inputs(problem, bias=each))


# ---- sinks, soft caps, scales

SINKS = {
    "minus-infinity": [-torch.inf] * H,
    "none-and-zero": [-torch.inf, 0.0],
    "large": [500.0, -500.0],
    "huge": [2e38, -2e38],
    "largest": [3.4e38, -3.4e38],
}


@pytest.mark.parametrize("mask", [Full(), Window(2, 0, offset=-3)], ids=["all-seen", "some-see-nothing"])
@pytest.mark.parametrize("name", SINKS)
def test_sinks_of_any_size(name, mask):
    problem = with_inputs(problem_of(sinks=True, mask=hidden(mask)), sinks=torch.tensor(SINKS[name], device=DEVICE))
    results = check(problem)
    assert (results["dsinks"][problem.inputs.sinks == -torch.inf] == 0).all()


def test_a_sink_that_is_no_sink_changes_nothing():
    problem = problem_of(mask=hidden(Causal()))
    sinks = torch.full((H,), -torch.inf, device=DEVICE)
    same(run(problem, "triton", grads=False), run(with_inputs(problem, sinks=sinks), "triton", grads=False))


@pytest.mark.parametrize("dtype", (*HALVES, torch.float64), ids=str)
def test_sinks_have_their_own_dtype(dtype):
    problem = problem_of(sinks=True)
    wanted = run(problem, "triton")["dsinks"]
    problem = with_inputs(problem, sinks=problem.inputs.sinks.to(dtype))
    got = check(problem)["dsinks"]
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 1e4])
@pytest.mark.parametrize("scale", [None, -2.0, 0.0], ids=["", "negative-scale", "no-scale"])
def test_soft_caps(softcap, scale):
    check(problem_of(softcap=softcap, scale=scale, mask=hidden(Causal()), dtype=torch.float32))


@pytest.mark.parametrize(
    "extra", [{"bias": (H, Q, K)}, {"sinks": True}, {"dropout_p": 0.3}], ids=["bias", "sinks", "dropout"]
)
def test_soft_caps_with(extra):
    check(problem_of(softcap=2.0, **extra))


@pytest.mark.parametrize("scale", [0.0, -1.5, 30.0])
def test_scales(scale):
    check(problem_of(scale=scale, mask=hidden(Causal())))


# ---- dropout


@pytest.mark.parametrize(
    ("p", "seed"),
    [(0.3, 0), (0.3, -1), (0.3, 2**63 - 1), (0.3, -(2**63)), (1e-9, 5), (1 - 1e-9, 5), (1.0, 0x1234_5678_9ABC)],
)
def test_the_weights_kept_are_the_contracts(p, seed):
    """The values are the identity, so that the output is the table of weights; its gradient's likewise."""
    q_len, kv_len = 18, 21
    seed = torch.tensor([seed], device=DEVICE)
    query, key = torch.randn(B, H, q_len, 8, device=DEVICE), torch.randn(B, H, kv_len, 8, device=DEVICE)
    value = torch.eye(kv_len, device=DEVICE).expand(B, H, -1, -1).clone().requires_grad_()
    with poison():
        out = attention(query, key, value, dropout_p=p, dropout_seed=seed, backend="triton")
        (d_value,) = torch.autograd.grad(out, value, torch.eye(q_len, kv_len, device=DEVICE).expand_as(out))
    kept = dropout_mask(B, H, q_len, kv_len, p=p, seed=seed)
    assert torch.equal(out != 0, kept)
    assert torch.equal(d_value[..., :q_len] != 0, kept.mT)


@pytest.mark.parametrize("mask", [Causal(), Window(7, 3)], ids=["causal", "window"])
def test_dropout_under_a_mask(mask):
    check(problem_of(q_len=40, kv_len=50, batch=1, dropout_p=0.3, mask=hidden(mask)))


def test_everything_dropped_is_zero():
    results = check(problem_of(dropout_p=1.0, sinks=True, bias=(Q, K)))
    assert all((results[name] == 0).all() for name in ("out", "dv")) and results["lse"].isfinite().all()


# ---- widths and dtypes

DIMS = [1, 3, 8, 65, 96, 192, 256]


@pytest.mark.parametrize("dim", DIMS)
def test_head_dims(dim):
    check(problem_of(head_dim=dim, batch=1, num_heads=2, num_kv_heads=1, mask=hidden(Causal())))


@pytest.mark.parametrize("dims", [(257, 257), (512, 512), (16, 300), (384, 1)], ids=str)
def test_wide_heads(dims):
    check(problem_of(head_dim=dims[0], head_dim_v=dims[1], batch=1, num_heads=1, num_kv_heads=1, mask=hidden(Causal())))


@pytest.mark.parametrize("dims", [(64, 1), (1, 64), (8, 24), (40, 16), (17, 3)], ids=str)
def test_values_of_another_width(dims):
    check(problem_of(head_dim=dims[0], head_dim_v=dims[1], batch=1, sinks=True, bias=(1, K)))


FEATURES = {"softcap": 5.0, "sinks": True, "bias": (H, Q, K), "dropout_p": 0.2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_with_every_feature(dtype):
    padding = Lengths(torch.tensor([K, 9], device=DEVICE), kv_starts=torch.tensor([3, 0], device=DEVICE))
    results = check(problem_of(dtype=dtype, head_dim=24, head_dim_v=40, mask=hidden(Causal() & padding), **FEATURES))
    assert {results[name].dtype for name in ("out", "dq", "dk", "dv")} == {dtype}
    assert results["lse"].dtype == torch.float32


# ---- memory

VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "heads-last": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "every-second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "odd-offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "odd-rows": lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1],
    "from-a-larger-one": lambda t: torch.nn.functional.pad(t, (8, 8, 3, 5, 1, 2))[:, 1:-2, 3:-5, 8:-8],
    "heads-first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


def descriptors(problem):
    """Which tensors the forward loads by descriptor."""
    spec = problem.spec
    out, lse = spec.empty_out(problem.inputs.query), spec.empty_lse(problem.inputs.query)
    first = launch.forward(spec, problem.inputs, out, lse, launch.target_for(spec.device))[0]
    names = ("query", "key", "value")
    return {name for name, each in zip(names, first.args, strict=False) if isinstance(each, TensorDescriptor)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_give_the_bits_of_contiguous_tensors(view, dtype):
    """Whatever the strides, gradients of the same strides included; loads by descriptor and by pointer agree."""
    problem = problem_of(q_len=40, kv_len=37, batch=2, num_kv_heads=2, dtype=dtype, mask=hidden(Causal()))
    tensors = {name: view(getattr(problem.inputs, name)) for name in ("query", "key", "value")}
    viewed = dataclasses.replace(with_inputs(problem, **tensors), d_out=view(problem.d_out))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, getattr(problem.inputs, name))
    want, got = run(problem, "triton"), run(viewed, "triton")
    same(want, got)
    check_close(viewed, got)


def test_descriptors_and_pointers_are_both_tried_by_the_views():
    """Half precision, on a target whose rows move tiles by descriptor: else the test above compares nothing."""
    if not launch.pick(problem_of().spec, "fwd", launch.target_for(problem_of().spec.device)).descriptors:
        pytest.skip("this device has no copy engine")
    everything = {"query", "key", "value"}
    found = {}
    for name, view in VIEWS.items():
        problem = problem_of(q_len=40, kv_len=37, num_kv_heads=2)
        tensors = {each: view(getattr(problem.inputs, each)) for each in everything}
        found[name] = descriptors(with_inputs(problem, **tensors))
    assert descriptors(problem_of(q_len=40, kv_len=37)) == everything
    movable = {"from-a-larger-one", "heads-first"}
    assert {name for name, each in found.items() if each == everything} == movable
    assert {name for name, each in found.items() if not each} == VIEWS.keys() - movable


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1, 2, 3)], ids=["batch", "heads", "length", "all"])
def test_repeated_memory_is_read_again_and_again(axes):
    """Strides of 0; each repetition has a gradient of its own."""
    problem = problem_of(num_kv_heads=H)
    tensors = {}
    for name in ("query", "key", "value"):
        tensor = getattr(problem.inputs, name)
        for axis in axes:
            tensor = tensor.narrow(axis, 0, 1)
        tensors[name] = tensor.expand(getattr(problem.inputs, name).shape)
    want = run(with_inputs(problem, **{name: each.contiguous() for name, each in tensors.items()}), "triton")
    same(want, check(with_inputs(problem, **tensors)))


# ---- gradients


@pytest.mark.parametrize("extra", [{}, {"sinks": True}, {"bias": (H, Q, K)}, {"softcap": 3.0}], ids=str)
def test_the_gradient_through_lse_alone(extra):
    """No gradient comes through the output: the values get none."""
    problem = problem_of(mask=hidden(Causal(offset=-5)), dtype=torch.float32, **extra)
    problem = dataclasses.replace(problem, d_out=torch.zeros_like(problem.d_out))
    leaves = problem.inputs.detached()
    with poison():
        _, lse = attention(
            **leaves._asdict(), mask=problem.mask, softcap=problem.case.softcap, backend="triton", return_lse=True
        )
        found = torch.autograd.grad(lse, leaves.differentiable, problem.d_lse)
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    results = {name: each for name, each in zip(names, leaves.in_place_of(found), strict=True) if each is not None}
    check_close(problem, results)
    assert (results["dv"] == 0).all()
    assert "dsinks" not in results or (results["dsinks"] == 0).all()


def test_the_gradient_of_one_input_alone_is_what_it_is_among_all():
    problem = problem_of(batch=1, bias=(1, Q, K), sinks=True)
    together = run(problem, "triton")
    for wanted, name in (("query", "dq"), ("key", "dk"), ("value", "dv"), ("bias", "dbias"), ("sinks", "dsinks")):
        leaves = problem.inputs.detached(requires_grad=False)
        leaf = getattr(leaves, wanted).requires_grad_()
        with poison():
            out, lse = attention(**leaves._asdict(), backend="triton", return_lse=True)
            (grad,) = torch.autograd.grad((out, lse), leaf, (problem.d_out, problem.d_lse))
        assert torch.equal(grad, together[name]), wanted


# ---- nothing

NOTHING = {
    "no-batch": {"batch": 0},
    "no-heads": {"num_heads": 0, "num_kv_heads": 0},
    "no-query-heads": {"num_heads": 0, "num_kv_heads": 2},
    "no-queries": {"q_len": 0},
    "no-keys": {"kv_len": 0},
    "neither": {"q_len": 0, "kv_len": 0},
    "nobody-anywhere": {"batch": 0, "q_len": 0, "kv_len": 0},
}
WITH = {
    "plain": {},
    "masked": {"mask": hidden(Causal())},
    "lists": {"mask": lambda case, _: Dense(torch.ones(case.q_len, case.kv, dtype=torch.bool, device=DEVICE))},
    "sinks": {"sinks": True},
    "dropout-softcap": {"dropout_p": 0.3, "softcap": 2.0},
}


@pytest.mark.parametrize("extra", WITH.values(), ids=WITH)
@pytest.mark.parametrize("sizes", NOTHING.values(), ids=NOTHING)
def test_nothing_gives_nothing(sizes, extra):
    problem = raw_problem(sizes, extra)
    check_close(problem, run(problem, "triton"))


@pytest.mark.parametrize(
    "own", [(True,) * 4, (False, False, True, True), (False,) * 3 + (True,)], ids=["all", "q-k", "k"]
)
@pytest.mark.parametrize("sizes", NOTHING.values(), ids=NOTHING)
def test_a_bias_of_nothing(sizes, own):
    case = raw_problem(sizes, {}).case
    shape = tuple(
        size if mine else 1 for size, mine in zip((case.batch, case.num_heads, case.q_len, case.kv), own, strict=True)
    )
    problem = raw_problem(sizes, {"bias": shape})
    results = run(problem, "triton")
    check_close(problem, results)
    assert results["dbias"].shape == shape


def raw_problem(sizes, extra):
    """Few tokens; as many key heads as query heads, unless said otherwise."""
    sizes = {"q_len": 5, "kv_len": 7, "num_kv_heads": 2, **sizes}
    return problem_of("nothing", **sizes, **extra)


def test_values_of_no_width_are_refused():
    query = torch.randn(1, 2, 5, 16, device=DEVICE)
    with pytest.raises(ValueError, match="each head_dim must be at least 1"):
        attention(query, query, query[..., :0], backend="triton")


def test_explain_names_every_kernel():
    query = torch.randn(1, 2, 5, 16, device=DEVICE, requires_grad=True)
    assert explain(query, query, query, bias=query.new_zeros(5, 5), backend="triton").kernel == (
        "attn_fwd, attn_delta, attn_dq, attn_dkv, attn_dbias"
    )
