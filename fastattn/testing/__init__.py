"""What holds a backend against the definition: cases, inputs, tolerance, memory filled with NaN."""

from fastattn.stable_names import export
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

export(globals())
