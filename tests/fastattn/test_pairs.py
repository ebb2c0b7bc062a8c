"""The backends of a call's forward and of its backward: how they are chosen, that it happens once, what is refused."""

import pytest
import torch

from fastattn import BackendUnavailable, attention, dispatch, explain, masks, reference
from fastattn.backends.protocol import Backend
from fastattn.masks.paged import Paged
from fastattn.spec import AttnInputs, AttnSpec


class ForwardOnly(Backend):
    """A backend that says what it is told, computes as the reference does, and notes its name when it does."""

    def __init__(self, name, ran, *, why_not=None, blocks=False):
        self.name, self.ran, self.reason, self.READS_BLOCKS = name, ran, why_not, blocks
        self.questions = 0

    def why_not(self, spec):
        self.questions += 1
        return self.reason

    def kernel_name(self, spec):
        return f"{self.name}_fwd"

    def forward(self, spec, inputs):
        self.ran.append(f"{self.name} forward")
        return reference.forward(spec, inputs)


class Whole(ForwardOnly):
    """One with a backward."""

    HAS_BACKWARD = True

    def __init__(self, name, ran, *, lacks=None, **rest):
        super().__init__(name, ran, **rest)
        self.lacks = lacks

    def why_not_backward(self, spec):
        return self.lacks

    def kernel_name_backward(self, spec):
        return f"{self.name}_bwd"

    def backward(self, spec, *tensors, **named):
        self.ran.append(f"{self.name} backward")
        return reference.backward(spec, *tensors, **named)


@pytest.fixture
def ran():
    return []


@pytest.fixture
def put(ran, monkeypatch):
    """put(fast=ForwardOnly, whole=(Whole, {...})) -> the made-up backends, in this order before the reference."""

    def make(**rows):
        made = {}
        for name, row in rows.items():
            kind, told = row if isinstance(row, tuple) else (row, {})
            made[name] = kind(name, ran, **told)
        real = dispatch.load
        monkeypatch.setattr(dispatch, "BACKENDS", (*made, "reference"))
        monkeypatch.setattr(dispatch, "load", lambda name: made[name] if name in made else real(name))
        monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
        return made

    return make


def leaves(grad=True):
    return [torch.randn(1, 2, n, 8).requires_grad_(grad) for n in (3, 5, 5)]


GONE, ASK = {"why_not": "it has no kernel for this"}, {"lacks": "its backward has no kernel for this"}
CHOICES = {
    "one-for-both": ({"whole": Whole, "other": Whole}, "whole", "whole"),
    "the-next-backward": ({"fast": ForwardOnly, "whole": Whole}, "fast", "whole"),
    "a-backward-before-the-forward": ({"whole": (Whole, GONE), "fast": ForwardOnly}, "fast", "reference"),
    "nobody-behind": ({"fast": ForwardOnly}, "fast", "reference"),
    "one-behind-that-cannot": ({"fast": ForwardOnly, "whole": (Whole, GONE), "other": Whole}, "fast", "other"),
    "a-backward-that-cannot": ({"whole": (Whole, ASK), "other": Whole}, "whole", "other"),
    "two-forwards": ({"fast": ForwardOnly, "quick": ForwardOnly, "whole": Whole}, "fast", "whole"),
    "nobody": ({"fast": (ForwardOnly, GONE), "whole": (Whole, GONE)}, "reference", "reference"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_free_choice(name, put, ran):
    """The first that can run the call, and the first of those that has a backward for it."""
    rows, forward, backward = CHOICES[name]
    put(**rows)
    verdict = explain(*leaves())
    assert (verdict.backend, verdict.backward) == (forward, backward)
    attention(*leaves()).sum().backward()
    by_reference = {"reference forward", "reference backward"}
    assert ran == [each for each in (f"{forward} forward", f"{backward} backward") if each not in by_reference]


@pytest.mark.parametrize("name", CHOICES)
def test_without_gradients_there_is_no_backward_and_the_same_forward(name, put, ran):
    rows, forward, _ = CHOICES[name]
    put(**rows)
    with torch.no_grad():
        verdict = explain(*leaves())
        attention(*leaves())
    attention(*leaves(grad=False))
    assert (verdict.backend, verdict.backward, verdict.backward_reasons) == (forward, None, {})
    assert ran == ([] if forward == "reference" else [f"{forward} forward"] * 2)


ALONE = {
    "query": lambda each: (each, {}),
    "bias": lambda each: (each.detach(), {"bias": torch.randn(5, requires_grad=True)}),
    "sinks": lambda each: (each.detach(), {"sinks": torch.randn(2, requires_grad=True)}),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_input_that_wants_a_gradient_is_enough(name, put, ran):
    put(fast=ForwardOnly, whole=Whole)
    query, key, value = leaves()
    query, more = ALONE[name](query)
    out = attention(query, key.detach(), value.detach(), **more)
    out.sum().backward()
    assert ran == ["fast forward", "whole backward"]


def watched(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return call()


def compiled(call):
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager")()


REFUSED = {
    "no-backward": (
        {"fast": ForwardOnly, "whole": Whole}, "fast",
        r"backend 'fast' cannot run this call: its backward does not exist yet. backend=None{} runs this very forward "
        r"with 'whole' as backward; under torch.no_grad\(\) 'fast' runs it",
    ),
    "a-backward-that-cannot": (
        {"whole": (Whole, ASK)}, "whole",
        r"'whole' cannot run this call: its backward has no kernel for this. backend=None{} runs this very forward "
        r"with 'reference' as backward; under torch.no_grad\(\) 'whole' runs it",
    ),
    "no-backward-and-another-forward-first": (
        {"other": Whole, "fast": ForwardOnly}, "fast",
        r"its backward does not exist yet. What can: 'other', 'reference'; backend=None{} chooses; under "
        r"torch.no_grad\(\) 'fast' runs it",
    ),
    "no-forward": (
        {"fast": (ForwardOnly, GONE), "quick": ForwardOnly, "whole": Whole}, "fast",
        r"'fast' cannot run this call: it has no kernel for this. What can: 'whole', 'reference'; "
        r"backend=None{} chooses$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize("way", [lambda call: call(), watched, compiled], ids=["eager", "profiled", "compiled"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_backend_asked_for_runs_both_or_refuses(name, way, by, put, ran, monkeypatch):
    rows, asked, says = REFUSED[name]
    put(**rows)
    inputs = leaves()
    if by == "environment":
        monkeypatch.setenv("FASTATTN_BACKEND", asked)
        says = says.format(" without FASTATTN_BACKEND")
    else:
        says = says.format("")
    asked = asked if by == "argument" else None
    with pytest.raises(BackendUnavailable, match=says):
        way(lambda: attention(*inputs, backend=asked))
    with pytest.raises(BackendUnavailable, match=says):
        explain(*inputs, backend=asked)
    assert not ran
    if "under torch.no_grad" in says:
        with torch.no_grad():
            way(lambda: attention(*inputs, backend=asked))
        assert ran == [f"{REFUSED[name][1]} forward"]


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_backend_asked_for_runs_both(by, put, ran, monkeypatch):
    put(fast=ForwardOnly, whole=Whole)
    if by == "environment":
        monkeypatch.setenv("FASTATTN_BACKEND", "whole")
    attention(*leaves(), backend="whole" if by == "argument" else None).sum().backward()
    assert ran == ["whole forward", "whole backward"]


CHANGES = {
    "appears": ({"new": (Whole, GONE), "whole": Whole}, "new", None, "new"),
    "disappears": ({"whole": Whole, "other": Whole}, "whole", "the library is gone", "other"),
}


@pytest.mark.parametrize("twice", [False, True], ids=["", "differentiable"])
@pytest.mark.parametrize("name", CHANGES)
def test_the_backward_is_chosen_before_the_forward_runs(name, twice, put, ran):
    """A library that is built or lost in between changes nothing of this call, and the next one's choice."""
    rows, who, reason, then = CHANGES[name]
    made = put(**rows)
    query, key, value = leaves()
    out = attention(query, key, value)
    made[who].reason = reason
    torch.autograd.grad(out.sum(), query, create_graph=twice)
    assert ran == ["whole forward", "whole backward"]
    attention(query, key, value).sum().backward()
    assert ran[2:] == [f"{then} forward", f"{then} backward"]


def test_each_is_asked_once_a_step(put):
    made = put(gone=(Whole, GONE), fast=ForwardOnly, whole=Whole, other=Whole)
    attention(*leaves()).sum().backward()
    assert [each.questions for each in made.values()] == [1, 1, 1, 0]


def test_an_environment_that_changes_is_read_by_the_next_call(put, ran, monkeypatch):
    """The spec of a plain call is kept; a choice is not."""
    put(fast=ForwardOnly, whole=Whole)
    inputs = leaves()
    for asked, forward in (("", "fast"), ("whole", "whole"), ("", "fast")):
        monkeypatch.setenv("FASTATTN_BACKEND", asked)
        attention(*inputs).sum().backward()
        assert ran[-2:] == [f"{forward} forward", "whole backward"]


def test_keys_in_blocks_are_read_forward_where_they_can_be(put, ran):
    """And their gradients are the reference's."""
    put(fast=(Whole, {"blocks": True}))
    query, pool = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(4, 2, 5, 8)
    mask = Paged(masks.Causal(), torch.tensor([[2, 0]], dtype=torch.int32), 5)
    spec = AttnSpec.of(AttnInputs(query, pool, pool), mask=mask)
    assert dispatch.choose(spec, None) == ("fast", "reference")
    attention(query, pool, pool, mask=mask).sum().backward()
    assert ran == ["fast forward"] and query.grad.abs().sum() > 0
    with pytest.raises(BackendUnavailable, match="keys in blocks are read forward only here"):
        attention(query, pool, pool, mask=mask, backend="fast")


def test_explain_shows_both(put):
    put(gone=(Whole, GONE), fast=ForwardOnly, quick=ForwardOnly, whole=Whole)
    verdict = explain(*leaves())
    assert (verdict.backend, verdict.backward, verdict.kernel) == ("fast", "whole", "fast_fwd, whole_bwd")
    none = "its backward does not exist yet"
    assert verdict.reasons == {"gone": GONE["why_not"], "fast": None, "quick": None, "whole": None, "reference": None}
    assert verdict.backward_reasons == {
        "gone": GONE["why_not"], "fast": none, "quick": none, "whole": None, "reference": None,
    }  # fmt: skip
    assert str(verdict).splitlines()[1:6] == [
        "gone       it has no kernel for this",
        f"fast       runs the forward: fast_fwd; {none}",
        f"quick      could run the forward; {none}",
        "whole      runs the backward: whole_bwd",
        "reference  could run this call",
    ]
    with torch.no_grad():
        verdict = explain(*leaves())
    assert (verdict.backend, verdict.backward, verdict.kernel) == ("fast", None, "fast_fwd")
    assert str(verdict).splitlines()[2:5] == [
        "fast       runs this call: fast_fwd",
        "quick      could run this call",
        "whole      could run this call",
    ]
