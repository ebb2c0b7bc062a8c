"""Problems drawn at random: every backend that runs them, against float64; and the definition against gradients by
hand.
"""

import dataclasses

import pytest
import torch
from hypothesis import given

from fastattn import dispatch
from fastattn.masks import visible_pairs
from fastattn.testing import check_close, make_inputs, run
from fastattn.testing.strategies import cases
from fastattn.testing.tolerance import baseline, exact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@given(case=cases())
def test_every_backend_stays_within_tolerance(backend, case):
    problem = make_inputs(case, DEVICE)
    if dispatch.free_reason(backend, problem.spec) is None:  # an interpreter has drawn problems of its own size
        check_close(problem, run(problem, backend))


@given(case=cases(60))
def test_the_definition_agrees_with_gradients_written_by_hand(case):
    """In float64 the baseline rounds nothing, so that it is a second derivation of everything."""
    problem = make_inputs(dataclasses.replace(case, dtype=torch.float64))
    by_hand, _ = baseline(problem)
    for name, result in exact(problem).items():
        torch.testing.assert_close(
            by_hand[name].double(), result, atol=1e-9, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@given(case=cases(90))
def test_counts_and_tables_of_drawn_masks_agree(case):
    problem = make_inputs(dataclasses.replace(case, head_dim=1))
    spec = problem.spec
    table = spec.mask.dense(spec.q_len, spec.kv_len).expand(spec.batch, spec.num_heads, spec.q_len, spec.kv_len)
    assert visible_pairs(spec.mask, spec.batch, spec.num_heads, spec.q_len, spec.kv_len) == int(table.sum())
