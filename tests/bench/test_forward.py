"""A forward cell wants no gradients, from the reason to the timing; a cell with a backward does."""

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.bench.cases.module import workload_of
from fastattn.bench.cases.operations import bench_cases
from fastattn.bench.cases.workload import Workload
from fastattn.bench.measure.providers.flex import Flex
from fastattn.bench.measure.providers.table import provider

NO_BACKWARD = "this backend's backward does not exist yet"


def small(op):
    [case] = bench_cases("cpu", ops=[op], q_len=[24], num_heads=[2], head_dim=[16])
    return case


@pytest.fixture
def forward_only(monkeypatch):
    """Makes a backend one that has a forward alone."""

    def stub(name):
        monkeypatch.setattr(dispatch.load(name), "why_not", lambda spec: NO_BACKWARD if spec.needs_grad else None)

    return stub


@pytest.mark.parametrize("op", ["self", "causal", "biased", "dropout", "module"])
def test_a_backend_with_a_forward_alone_has_its_forward_cells_timed(op, forward_only, timed):
    forward_only("reference")
    [row] = timed(op, "fwd", ["fastattn-reference"])
    assert row.timed and row.correct and row.label == "reference", row.reason


@pytest.mark.parametrize("mode", ["bwd", "fwd+bwd"])
@pytest.mark.parametrize("op", ["self", "biased"])
def test_it_refuses_a_backward_in_its_own_words(op, mode, forward_only, timed):
    forward_only("reference")
    [row] = timed(op, mode, ["fastattn-reference"])
    assert row.reason == NO_BACKWARD and not row.crashed


def test_the_free_choice_is_asked_and_labelled_mode_by_mode(forward_only, monkeypatch, cpu):
    forward_only("reference")
    for name in dispatch.BACKENDS:
        if name != "reference":
            monkeypatch.setattr(
                dispatch.load(name), "why_not", lambda spec: None if spec.needs_grad else "training alone"
            )
    workload = workload_of(small("self"), cpu)
    labels = {mode: provider("fastattn").make(workload, mode).label for mode in ("fwd", "bwd", "fwd+bwd")}
    assert labels["fwd"] == "reference" and "reference" not in (labels["bwd"], labels["fwd+bwd"])


@pytest.mark.parametrize("op", ["self", "biased"])
def test_nothing_that_a_forward_calls_wants_gradients(op, cpu, monkeypatch, timed):
    """Reason, first call, check and timing: whoever they ask sees tensors without gradients and autograd off."""
    seen = []
    honest, explain = fastattn.attention, fastattn.explain

    def look(function):
        def looked(query, key, value, **more):
            given = [each for each in (query, key, value, more.get("bias")) if each is not None]
            seen.append((function.__name__, torch.is_grad_enabled() or any(each.requires_grad for each in given)))
            return function(query, key, value, **more)

        return looked

    monkeypatch.setattr(fastattn, "attention", look(honest))
    monkeypatch.setattr(fastattn, "explain", look(explain))
    [row] = timed(op, "fwd", ["fastattn"])
    assert row.timed and {name for name, _ in seen} == {"attention", "explain"} and not any(wants for _, wants in seen)
    seen.clear()
    [row] = timed(op, "fwd+bwd", ["fastattn"])
    assert row.timed and all(wants for _, wants in seen)


@pytest.mark.parametrize("mode, wants", [("fwd", False), ("bwd", True)])
def test_flex_compiles_what_its_mode_needs(mode, wants, cpu, monkeypatch):
    calls = []

    def attend(query, key, value, **more):
        calls.append((query.requires_grad, torch.is_grad_enabled()))
        return query * key * value

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: attend)
    Flex().make(Workload(small("self"), cpu), mode)
    assert calls == [(wants, wants)]
