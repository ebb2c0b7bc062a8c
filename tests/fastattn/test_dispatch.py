"""Which backend runs: the free choice, the explicit one, the environment, and the explanation."""

import inspect

import pytest
import torch

from fastattn import BackendUnavailable, attention, dispatch, explain
from fastattn.backends.protocol import Backend
from fastattn.masks import Causal
from fastattn.spec import AttnSpec

Q = torch.randn(1, 2, 3, 8)


class MadeUp(Backend):
    """A backend that says what it is told."""

    def __init__(self, reason, needs=None):
        self.reason, self.needs, self.calls = reason, needs, 0

    def why_not(self, spec):
        assert isinstance(spec, AttnSpec)
        return self.reason

    def needs_asking(self, spec):
        return self.needs

    def kernel_name(self, spec):
        return "made-up kernel"

    def forward(self, spec, inputs):
        self.calls += 1
        return spec.empty_out(inputs.query).fill_(7), spec.empty_lse(inputs.query).zero_()


@pytest.fixture
def made_up(monkeypatch):
    """Put a made-up backend first in the list."""

    def put(reason=None, needs=None):
        backend = MadeUp(reason, needs)
        real = dispatch.load
        monkeypatch.setattr(dispatch, "BACKENDS", ("made-up", "reference"))
        monkeypatch.setattr(dispatch, "load", lambda name: backend if name == "made-up" else real(name))
        monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
        return backend

    return put


def test_a_free_choice_takes_the_first_backend_that_can_run(made_up):
    backend = made_up()
    assert (attention(Q, Q, Q) == 7).all()
    assert backend.calls == 1


def test_a_free_choice_passes_by_a_backend_that_cannot(made_up):
    backend = made_up("it has no kernel for this")
    torch.testing.assert_close(attention(Q, Q, Q), torch.nn.functional.scaled_dot_product_attention(Q, Q, Q))
    assert backend.calls == 0


def test_a_backend_that_wants_asking_runs_only_when_asked(made_up):
    backend = made_up(needs="it is an interpreter")
    attention(Q, Q, Q)
    assert backend.calls == 0
    attention(Q, Q, Q, backend="made-up")
    assert backend.calls == 1


def test_an_explicit_choice_never_falls_back(made_up):
    backend = made_up("it has no kernel for this")
    with pytest.raises(
        BackendUnavailable, match=r"'made-up' cannot run this call: it has no kernel.*What can: 'reference'"
    ):
        attention(Q, Q, Q, backend="made-up")
    assert backend.calls == 0
    assert issubclass(BackendUnavailable, RuntimeError)


def test_the_environment_is_what_none_means(made_up, monkeypatch):
    backend = made_up()
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    attention(Q, Q, Q)
    assert backend.calls == 0
    monkeypatch.setenv("FASTATTN_BACKEND", "made-up")
    attention(Q, Q, Q)
    assert backend.calls == 1
    attention(Q, Q, Q, backend="reference")
    assert backend.calls == 1
    monkeypatch.setenv("FASTATTN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FASTATTN_BACKEND: unknown backend 'nonsense'"):
        attention(Q, Q, Q)


def test_explain_says_what_runs_and_why_not_the_others(made_up):
    made_up("it has no kernel for this")
    verdict = explain(Q, Q, Q, mask=Causal())
    assert verdict.backend == "reference"
    assert verdict.reasons == {"made-up": "it has no kernel for this", "reference": None}
    lines = str(verdict).splitlines()
    assert lines[1] == "made-up    it has no kernel for this"
    assert lines[2] == "reference  runs this call: plain PyTorch"
    assert lines[3].startswith("note: second derivatives")


def test_explain_works_on_meta_tensors_and_refuses_as_the_call_does(made_up):
    made_up()
    meta = Q.to("meta")
    verdict = explain(meta, meta, meta, return_lse=True, dropout_p=0.5)
    assert (verdict.backend, verdict.kernel) == ("made-up", "made-up kernel")
    with pytest.raises(ValueError, match="same head_dim"):
        explain(meta, meta[..., :4], meta)
    with pytest.raises(ValueError, match="unknown backend"):
        explain(meta, meta, meta, backend="fast")


def test_explain_names_an_argument_that_attention_has_not(made_up):
    with pytest.raises(TypeError, match=r"explain: attention takes no masks= \(nearest: mask\)"):
        explain(Q, Q, Q, masks=3)


def test_explain_mentions_autocast(made_up):
    made_up()
    with torch.autocast("cpu", torch.bfloat16):
        verdict = explain(Q, Q, Q)
    assert any("autocast" in note for note in verdict.notes)


MEMBERS = [name for name in vars(Backend) if not name.startswith("_")]


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_every_backend_has_all_of_the_protocol_itself(name):
    """Nothing is looked up with a default. The CUDA backend has no backward yet."""
    backend = dispatch.load(name)
    assert "why_not" in MEMBERS and "HAS_BACKWARD" in MEMBERS
    for member in MEMBERS:
        promised, found = getattr(Backend, member), getattr(backend, member)
        if callable(promised):
            _, *parameters = inspect.signature(promised).parameters.values()
            assert [(each.name, each.kind, each.default) for each in parameters] == [
                (each.name, each.kind, each.default) for each in inspect.signature(found).parameters.values()
            ], member
    assert (name != "cuda") == backend.HAS_BACKWARD
