"""Problems to hold a backend against the definition: rows, inputs, one run of them. Shared by tests, `fastattn check`
and bench.

problem = make_inputs(case, device)
check_close(problem, run(problem, backend="triton"))     # the tolerance: tolerance.py
"""

from fastattn.testing.cases import (  # noqa: F401 (the rest is what tests share)
    CASES,
    HALF,
    LARGE_CASES,
    LAYOUTS,
    Case,
    Problem,
    both,
    is_,
    lengths,
    make_inputs,
    offsets,
    packed,
    poison,
    run,
    table,
    with_dtype,
)
from fastattn.testing.tolerance import Agreement, agreement, check_close

__all__ = [
    "Agreement", "CASES", "Case", "LARGE_CASES", "Problem", "agreement", "check_close", "lengths", "make_inputs",
    "poison", "run",
]  # fmt: skip
