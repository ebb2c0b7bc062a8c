"""Composability: what torch's own subsystems may do to a call of attention, each compared with plain eager."""

import contextlib
import io

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastattn import attention, dispatch, ops
from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Mask, Window
from fastattn.reference import plain
from fastattn.spec import AttnInputs, AttnSpec

WIDE = torch.float64
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window-lengths": Window(2, 1) & Lengths(torch.tensor([5, 3])),
    "chunked-or-lengths": Chunked(2) | Lengths(torch.tensor([1, 0])),
    "dense": Dense(torch.tensor([True, False, True, True, True])),
}


def leaves(dtype=WIDE, grad=True, q_len=4, kv_len=5):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 4, q_len, 6), (2, 2, kv_len, 6), (2, 2, kv_len, 3))
    return [torch.randn(s, generator=generator, dtype=WIDE).to(dtype).requires_grad_(grad) for s in shapes]


def rich(mask: Mask):
    """attention with a bias, a sink, soft cap and dropout, as a function of five tensors."""
    seed = torch.tensor([11])

    def call(query, key, value, bias, sinks):
        return attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            sinks=sinks,
            softcap=2.0,
            dropout_p=0.25,
            dropout_seed=seed,
            return_lse=True,
        )

    return call


def more_leaves():
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randn(4, 1, 5, generator=generator, dtype=WIDE).requires_grad_(),
        torch.randn(4, generator=generator, dtype=WIDE).requires_grad_(),
    ]


def grads(function, inputs):
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    return torch.autograd.grad([each.sin().sum() for each in results], inputs)


@pytest.mark.parametrize("name", MASKS)
def test_gradcheck_of_every_input(name):
    mask = MASKS[name]
    bias, sinks = more_leaves()
    bias = bias.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        rich(mask), (*leaves(), bias.float().double().detach().requires_grad_(), sinks), fast_mode=True
    )


@pytest.mark.parametrize("name", MASKS)
def test_gradgradcheck(name):
    bias, sinks = more_leaves()
    assert torch.autograd.gradgradcheck(rich(MASKS[name]), (*leaves(), bias, sinks), fast_mode=True)


def test_second_derivative_of_one_input_alone():
    query, key, value = leaves()
    key, value = key.detach(), value.detach()
    out = attention(query, key, value)
    (first,) = torch.autograd.grad(out.sin().sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), query)
    inputs = AttnInputs(query, key, value)
    out = plain(AttnSpec.of(inputs), inputs)[0]
    (first,) = torch.autograd.grad(out.sin().sum(), query, create_graph=True)
    (want,) = torch.autograd.grad(first.square().sum(), query)
    torch.testing.assert_close(second, want)


def test_third_derivatives_are_whole():
    """With a term of its own beside them, a missing part would not even be an error."""
    query, key, value = leaves(q_len=3)

    def third(function):
        (first,) = torch.autograd.grad(function(query).sin().sum(), query, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), query, create_graph=True)
        return torch.autograd.grad(second.square().sum() + query.square().sum(), query)[0]

    inputs = AttnInputs(query, key, value)
    got, want = (
        third(function)
        for function in (
            lambda x: attention(x, key, value),
            lambda x: plain(AttnSpec.of(inputs), inputs._replace(query=x))[0],
        )
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_opcheck_of_both_operators(name, grad):
    spec_of = lambda inputs: AttnSpec.of(inputs, mask=MASKS[name])
    inputs = AttnInputs(*leaves(torch.float32, grad))
    packed = spec_of(inputs).flat()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.FORWARD, (*inputs, *packed, ""), test_utils=tests)
    turned = AttnInputs(
        *(each.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(grad) for each in inputs[:3])
    )
    torch.library.opcheck(ops.FORWARD, (*turned, *packed, ""), test_utils=tests)
    out, lse, *low = ops.FORWARD(*inputs, *packed, "")
    backward = (
        torch.randn_like(out),
        None,
        out.detach(),
        lse.detach(),
        *(part.detach() if grad else None for part in low),
        *(each if each is None else each.detach() for each in inputs),
    )
    torch.library.opcheck(ops.BACKWARD, (*backward, *packed, ""), test_utils=tests)


@pytest.mark.parametrize("name", MASKS)
def test_compile_fullgraph_equals_eager(name):
    torch._dynamo.reset()
    function = rich(MASKS[name])
    inputs = (*leaves(), *more_leaves())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*inputs), function(*inputs), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(grads(compiled, inputs), grads(function, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_gradients_lie_as_compiled_code_is_told(dtype, backend):
    """It reads them in the dtype and strides of the inputs, unseen; a bias that lies as T5's does among them."""
    query = torch.randn(1, 2, 7, 8).to(dtype)
    bias, sinks = torch.randn(7, 7, 2).to(dtype).permute(2, 0, 1), torch.randn(2).to(dtype)
    inputs = AttnInputs(query, query, query, bias, sinks)
    reason = dispatch.load(backend).why_not(AttnSpec.of(inputs))
    if reason is not None:
        pytest.skip(reason)
    packed = AttnSpec.of(inputs).flat()
    out, lse, *low = ops.FORWARD(*inputs, *packed, backend)
    grads = ops.BACKWARD(torch.randn_like(out), None, out, lse, *low, *inputs, *packed, backend)
    for grad, given in zip(grads, inputs, strict=False):
        assert (grad.dtype, grad.shape, grad.stride()) == (given.dtype, given.shape, torch.empty_like(given).stride())


def test_compile_makes_masks_inside_and_follows_dynamic_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(query, key, value, lengths):
        return attention(query, key, value, mask=Window(2, 0) & Lengths(lengths))

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for length in (5, 9, 17, 33):
        inputs = leaves(torch.float32, q_len=length, kv_len=length)
        lengths = torch.tensor([length, length // 2])
        torch.testing.assert_close(compiled(*inputs, lengths), function(*inputs, lengths), rtol=0, atol=0)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4


def test_compiled_window_sizes_are_numbers_not_code():
    """A window of another size is the same graph."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    inputs = leaves(torch.float32, grad=False)
    compiled = torch.compile(
        lambda window: attention(*inputs, mask=Window(window, 0)), fullgraph=True, backend=counter, dynamic=True
    )
    for window in (2, 3, 4):
        assert torch.equal(compiled(window), attention(*inputs, mask=Window(window, 0)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_keeps_attention_as_one_node_and_saves(strict):
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return attention(query, key, value, mask=Causal())

    inputs = tuple(leaves(torch.float32, grad=False))
    program = torch.export.export(Model(), inputs, strict=strict)
    nodes = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.fastattn.attention_forward.default in nodes
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(*inputs), attention(*inputs, mask=Causal()))


def test_export_takes_masks_as_inputs():
    class Model(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return attention(query, key, value, mask=mask)

    mask = Causal() & Lengths(torch.tensor([5, 3]))
    inputs = (*leaves(torch.float32, grad=False), mask)
    program = torch.export.export(Model(), inputs, strict=False)
    assert torch.equal(program.module()(*inputs), attention(*inputs[:3], mask=mask))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_redraws_the_same_dropout(reentrant):
    def function(query, key, value):
        return attention(query, key, value, mask=Causal(), dropout_p=0.5)

    inputs = leaves()
    torch.manual_seed(1)
    want = torch.autograd.grad(function(*inputs).sin().sum(), inputs)
    torch.manual_seed(1)
    for each in inputs:
        each.grad = None
    checkpoint(function, *inputs, use_reentrant=reentrant).sin().sum().backward()
    for each, grad in zip(inputs, want, strict=True):
        torch.testing.assert_close(each.grad, grad, rtol=0, atol=0)


@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_checkpointing_with_a_watcher_on_one_side(watched):
    """The recomputation may take the other way through the operators than the first run did."""
    from torch.utils.flop_counter import FlopCounterMode

    def watch(side):
        return FlopCounterMode(display=False) if side == watched else contextlib.nullcontext()

    query, key, value = leaves()
    mask = Lengths(torch.tensor([5, 3]), kv_starts=torch.tensor([1, 0]))
    with watch("forward"):
        out = checkpoint(lambda x: attention(x, key, value, mask=mask), query, use_reentrant=False)
    with watch("backward"):
        (got,) = torch.autograd.grad(out.sin().sum(), query)
    (want,) = torch.autograd.grad(attention(query, key, value, mask=mask).sin().sum(), query)
    assert torch.equal(got, want)


def test_saved_tensors_can_be_offloaded():
    inputs = leaves()
    want = grads(lambda *x: attention(*x), inputs)
    with torch.autograd.graph.save_on_cpu():
        got = grads(lambda *x: attention(*x), inputs)
    assert all(torch.equal(left, right) for left, right in zip(got, want, strict=True))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda a: f(a).sin().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](f(x))[0],
    "jacrev": lambda f, x: torch.func.jacrev(lambda a: f(a)[0, 0, 0])(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda a: f(a)[0, 0, 0])(x),
    "hessian": lambda f, x: torch.func.hessian(lambda a: f(a)[0, 0, 0, 0])(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x.sin()])),
    "vmap-grad": lambda f, x: torch.vmap(torch.func.grad(lambda a: f(a).sin().sum()))(torch.stack([x, x.sin()])),
}


def both_ways(mask):
    _, key, value = leaves(grad=False)
    fused = lambda query: attention(query, key, value, mask=mask)
    definition = lambda query: plain(
        AttnSpec.of(AttnInputs(query, key, value), mask=mask), AttnInputs(query, key, value)
    )[0]
    return fused, definition, leaves(grad=False)[0]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["causal", "window-lengths"])
def test_functorch_transforms(transform, name):
    fused, definition, query = both_ways(MASKS[name])
    torch.testing.assert_close(TRANSFORMS[transform](fused, query), TRANSFORMS[transform](definition, query))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "vmap-grad"])
def test_functorch_transforms_inside_compile(transform):
    """The ones that a custom operator would get silently wrong: they are traced through the plain formulation
    instead.
    """
    torch._dynamo.reset()
    fused, _, query = both_ways(Causal())
    compiled = torch.compile(lambda x: TRANSFORMS[transform](fused, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), TRANSFORMS[transform](fused, query))


def test_vmap_over_a_gradient():
    query, key, value = leaves()
    out, lse = attention(query, key, value, mask=Causal(), return_lse=True)
    for result in (out, lse):
        above = torch.randn(3, *result.shape, dtype=WIDE)
        grad = lambda each, r=result: torch.autograd.grad(r, query, each, retain_graph=True)[0]
        torch.testing.assert_close(torch.vmap(grad)(above), torch.stack([grad(each) for each in above]))


def test_forward_mode_differentiation():
    fused, definition, query = both_ways(Causal())
    tangents = []
    for function in (fused, definition):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(function(forward_ad.make_dual(query, query.cos()))).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "compiled-before"])
def test_forward_mode_around_a_compiled_function(warm):
    torch._dynamo.reset()
    fused, _, query = both_ways(Causal())
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    if warm:
        compiled(query)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, query.cos())
        tangent = forward_ad.unpack_dual(compiled(dual)).tangent
        assert tangent is not None
        torch.testing.assert_close(tangent, forward_ad.unpack_dual(fused(dual)).tangent)


def test_fake_and_meta_tensors_give_shapes():
    query, key, value = (each.to("meta") for each in leaves(torch.float32))
    out, lse = attention(query, key, value, mask=Causal(), return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 4, 4, 3), (2, 4, 4), "meta")
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(1, 2, 3, 4)
        assert attention(fake, fake, fake).shape == fake.shape


def test_gradients_of_many_at_once():
    """torch.autograd.grad(is_grads_batched=True) hands one tensor that holds a gradient for each."""
    inputs = leaves()
    out, lse = attention(*inputs, mask=Causal(), return_lse=True)
    many = torch.randn(3, *out.shape, dtype=WIDE), torch.randn(3, *lse.shape, dtype=WIDE)
    batched = torch.autograd.grad((out, lse), inputs, many, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        alone = torch.autograd.grad((out, lse), inputs, (many[0][n], many[1][n]), retain_graph=True)
        for got, want in zip(batched, alone, strict=True):
            torch.testing.assert_close(got[n], want)


def test_inference_mode_and_no_grad():
    inputs = leaves()
    want = attention(*inputs)
    with torch.inference_mode():
        assert torch.equal(attention(*inputs), want)
    with torch.no_grad():
        assert not attention(*inputs).requires_grad


def test_make_fx_traces_one_node():
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *x: attention(*x, mask=Causal()))(*leaves(grad=False))
    assert [node.target for node in traced.graph.nodes if "attention" in str(node.target)] == [ops.FORWARD]


def test_deterministic_false_is_refused_under_deterministic_algorithms():
    inputs = leaves(torch.float32)
    attention(*inputs, deterministic=False)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="use_deterministic_algorithms"):
            attention(*inputs, deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
