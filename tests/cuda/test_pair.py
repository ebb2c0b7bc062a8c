"""Training on Hopper: the CUDA forward with Triton's backward. Here the one runs in the simulator and the other in
Triton's interpreter, chosen by the dispatch itself; on a GPU, tests/cuda/test_gpu.py has the same.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastattn import BackendUnavailable, attention, dropout_mask, explain
from fastattn.masks import Causal, Dense, Lengths, Window
from fastattn.testing import HALF, Case, check_close, is_, lengths, make_inputs, run, table

pytestmark = pytest.mark.usefixtures("on_both_simulators")

PAIR = [("cuda", "forward"), ("triton", "backward")]
LEFT = {"kv_starts": (11, 60)}
_ROWS = (
    Case("plain", 64, 96, head_dim=64),
    Case("float16", 50, 70, head_dim=64, dtype=torch.float16),
    Case("odd", 37, 133, head_dim=64),
    Case("dim80", 40, 72, head_dim=80),
    Case("dim128", 40, 72, batch=1, head_dim=128),
    Case("dim-v", 33, 50, head_dim=64, head_dim_v=40),
    Case("causal", 70, head_dim=64, mask=is_(Causal())),
    Case("causal-cross", 40, 90, head_dim=128, batch=1, mask=is_(Causal())),
    Case("causal-empty-rows", 90, 40, head_dim=64, mask=is_(Causal())),
    Case("window", 100, head_dim=64, mask=is_(Window(17, 5))),
    Case("gqa", 40, 56, num_heads=6, num_kv_heads=2, batch=1, head_dim=64),
    Case("gqa-causal", 61, num_heads=4, num_kv_heads=1, batch=1, head_dim=128, mask=is_(Causal())),
    Case("lengths", 50, 70, head_dim=64, mask=lengths(33, 0)),
    Case("left-padding", 50, 70, head_dim=64, mask=lengths(70, 60, **LEFT)),
    Case("lengths-q", 50, 70, head_dim=64, mask=lengths(33, 70, q_lengths=(50, 7))),
    Case("table", 50, 70, head_dim=64, mask=table),
    Case("bias", 40, 56, head_dim=64, bias=(2, 2, 40, 56)),
    Case("bias-key", 40, 56, head_dim=64, bias=(2, 1, 1, 56), bias_dtype=HALF, mask=is_(Causal())),
    Case("sinks", 40, 56, head_dim=64, sinks=True, mask=is_(Window(9, 0))),
    Case("softcap", 40, 56, head_dim=64, softcap=3.0, mask=is_(Causal())),
    Case("dropout", 40, 57, head_dim=64, dropout_p=0.3),
    Case("everything", 40, 56, num_heads=4, num_kv_heads=2, head_dim=80, mask=is_(Window(20, 3)), bias=(1, 4, 1, 56),
         softcap=5.0, sinks=True, dropout_p=0.1, layout="blhd"),
    Case("strided", 30, 50, head_dim=64, layout="strided"),
    Case("kv0", 5, 0, head_dim=64),
    Case("one-by-one", 1, 1, head_dim=64),
)  # fmt: skip
ROWS = {case.id: case for case in _ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_the_two_are_within_the_tolerance(name, ran):
    """out, lse and every gradient, one that comes through lse among them."""
    problem = make_inputs(ROWS[name])
    results = run(problem)
    assert ran == PAIR
    check_close(problem, results)


def test_the_forward_drops_what_the_backward_drops():
    """Bit by bit: values that are the unit vectors give the weights, and the gradient of the values does once more."""
    seed, p, length = torch.tensor([42]), 0.4, 64
    query = torch.randn(1, 2, length, 64).bfloat16()
    value = torch.eye(length).bfloat16().expand(1, 2, -1, -1).clone().requires_grad_()
    out = attention(query, query, value, dropout_p=p, dropout_seed=seed)
    (d_value,) = torch.autograd.grad(out, value, torch.eye(length).bfloat16().expand(1, 2, -1, -1))
    kept = dropout_mask(1, 2, length, length, p=p, seed=seed)
    assert torch.equal(out != 0, kept) and torch.equal(d_value.mT != 0, kept)


def test_without_a_gradient_of_lse(ran):
    problem = make_inputs(ROWS["causal"])
    leaves = problem.inputs.detached()
    out = attention(*leaves[:3], mask=Causal())
    grads = torch.autograd.grad(out, leaves.differentiable, problem.d_out)
    assert ran == PAIR
    without = dataclasses.replace(problem, d_lse=torch.zeros_like(problem.d_lse))
    check_close(without, dict(zip(("dq", "dk", "dv"), grads, strict=True)))


ALONE = {"bias": (2, 2, 5, 7), "sinks": (2,)}


@pytest.mark.parametrize("name", ALONE)
def test_a_gradient_of_the_bias_or_the_sinks_alone(name, ran):
    query, key = (torch.randn(2, 2, length, 64).bfloat16() for length in (5, 7))
    wants = torch.randn(ALONE[name]).requires_grad_()
    assert explain(query, key, key, **{name: wants}).backward == "triton"
    (got,) = torch.autograd.grad(attention(query, key, key, **{name: wants}).float().sin().sum(), wants)
    assert ran == PAIR
    double = attention(*(each.double() for each in (query, key, key)), **{name: wants}, backend="reference")
    (want,) = torch.autograd.grad(double.sin().sum(), wants)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-2)


def leaves(length=20):
    return [torch.randn(1, heads, length, 64).bfloat16().requires_grad_() for heads in (2, 1, 1)]


class Model(torch.nn.Module):
    """Attention of a query that comes on keys that are learned."""

    def __init__(self, key, value):
        super().__init__()
        self.key, self.value = torch.nn.Parameter(key.detach()), torch.nn.Parameter(value.detach())

    def forward(self, query):
        return attention(query, self.key, self.value, mask=Causal())


def compiled(model, query):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")(query)


def profiled(model, query):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return model(query)


def counted(model, query):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return model(query)


def exported(strict):
    def call(model, query):
        return torch.export.export(model, (query,), strict=strict).module()(query)

    return call


WAYS = {
    "eager": lambda model, query: model(query),
    "compiled": compiled,
    "profiled": profiled,
    "counted": counted,
    "exported": exported(False),
    "exported-strict": exported(True),
    "checkpointed": lambda model, query: checkpoint(model, query, use_reentrant=False),
    "checkpointed-reentrant": lambda model, query: checkpoint(model, query, use_reentrant=True),
    "functional": lambda model, query: torch.func.functional_call(model, dict(model.named_parameters()), (query,)),
}


@pytest.mark.parametrize("watched", [False, True], ids=["", "backward-profiled"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_two_train_whoever_watches(way, watched, ran):
    query, key, value = leaves()
    model = Model(key, value)
    wanted = (query, *model.parameters())
    want = torch.autograd.grad(model(query).float().square().sum(), wanted)
    assert ran == PAIR
    ran.clear()
    out = WAYS[way](model, query).float().square().sum()
    watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if watched else None
    with watch or contextlib.nullcontext():
        out.backward()
    again = way.startswith("checkpointed")
    assert ran == [PAIR[0]] * (1 + again) + [PAIR[1]]
    for got, each in zip(wanted, want, strict=True):
        assert torch.equal(got.grad, each)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_forward_runs_without_gradients(way, ran):
    query, key, value = leaves()
    model = Model(key, value)
    with torch.no_grad():
        want = model(query)
        assert ran == PAIR[:1] and explain(query, key, value).backward is None
        ran.clear()
        assert torch.equal(WAYS[way](model, query), want)
    assert ran == PAIR[:1]


@pytest.mark.parametrize("traced", [True, False], ids=["with-gradients", "without"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "run"])
def test_a_program_runs_with_gradients_and_without_however_it_was_exported(traced, trained, ran):
    query, key, value = leaves()
    model = Model(key, value)
    want = torch.autograd.grad(model(query).float().square().sum(), query)[0]
    with torch.set_grad_enabled(traced):
        program = torch.export.export(model, (query,))
    ran.clear()
    with torch.set_grad_enabled(trained):
        out = program.module()(query)
    if trained:
        out.float().square().sum().backward()
        assert torch.equal(query.grad, want)
    assert ran == (PAIR if trained else PAIR[:1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["with-gradients", "without"])
def test_a_program_of_the_old_tracer_trains_with_the_two(grad, ran):
    """Traced with gradients it is recorded once more without, and the two records must be equal."""
    query, key, value = leaves()
    model = Model(key, value)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (query,))
    ran.clear()
    traced(query).float().square().sum().backward()
    assert ran == PAIR and query.grad.abs().sum() > 0


def test_a_gradient_of_a_gradient_begins_with_the_same_two(ran):
    query, key, value = leaves(5)
    (first,) = torch.autograd.grad(attention(query, key, value).float().square().sum(), query, create_graph=True)
    assert ran == PAIR
    assert torch.autograd.grad(first.float().square().sum(), query)[0].isfinite().all()


REFUSES = (
    r"backend 'cuda' cannot run this call: its backward does not exist yet. backend=None{} runs this very forward with "
    r"'triton' as backward; under torch.no_grad\(\) 'cuda' runs it"
)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", [name for name in WAYS if name != "checkpointed-reentrant"])
def test_the_forward_asked_for_by_name_refuses_who_wants_gradients(way, ran, monkeypatch):
    """Whoever watches; a reentrant checkpoint runs it without gradients first."""
    query, key, value = leaves()
    model = Model(key, value)
    monkeypatch.setenv("FASTATTN_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match=REFUSES.format(" without FASTATTN_BACKEND")):
        WAYS[way](model, query)
    assert not ran
    with torch.no_grad():
        WAYS[way](model, query)
    assert ran == PAIR[:1]
    monkeypatch.delenv("FASTATTN_BACKEND")
    for asks in (attention, explain, lambda *given, **named: torch.jit.trace(lambda *x: attention(*x, **named), given)):
        with pytest.raises(BackendUnavailable, match=REFUSES.format("")):
            asks(query, key, value, backend="cuda")


def test_a_program_exported_for_a_backend_refuses_gradients_that_it_was_not_traced_with(ran):
    class Named(torch.nn.Module):
        def forward(self, query):
            return attention(query, query, query, backend="cuda")

    query = leaves()[0]
    with torch.no_grad():
        program = torch.export.export(Named(), (query,))
        program.module()(query)
    assert ran == PAIR[:1]
    with pytest.raises(BackendUnavailable, match=REFUSES.format("")):
        program.module()(query)


def test_what_the_forward_cannot_do_goes_to_triton_whole(ran):
    query = torch.randn(1, 2, 8, 64, requires_grad=True)
    verdict = explain(query, query, query)
    assert (verdict.backend, verdict.backward) == ("triton", "triton")
    attention(query, query, query).sum().backward()
    assert ran == [("triton", "forward"), ("triton", "backward")]


def test_hidden_numbers_stay_hidden_in_both(ran):
    """Keys and queries that nobody sees hold NaN, the gradients that come to hidden rows too."""
    mask = Lengths(torch.tensor([5]), q_lengths=torch.tensor([6])) & Dense(torch.arange(9) != 3)
    clean = [torch.randn(1, 2, 9, 64).bfloat16() for _ in range(4)]
    dirty = [each.clone() for each in clean]
    for tensor, rows in zip(dirty, ([6, 7, 8], [3, 5, 8], [3, 5, 8], [6, 7, 8]), strict=True):
        tensor[:, :, rows] = float("nan")
    results = []
    for *tensors, above in (clean, dirty):
        tensors = [each.requires_grad_() for each in tensors]
        out = attention(*tensors, mask=mask)
        results.append((out, *torch.autograd.grad(out, tensors, above)))
    assert ran == PAIR * 2
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
