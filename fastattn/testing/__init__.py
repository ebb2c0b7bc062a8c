"""What holds a backend against the definition: cases, inputs, tolerance, memory filled with NaN."""

from fastattn.stable_names import export
from fastattn.testing.cases import (
    CASES,
    LARGE_CASES,
    Case,
    Problem,
    lengths,
    make_inputs,
    poison,
    run,
)
from fastattn.testing.cases import (
    HALF as HALF,
)
from fastattn.testing.cases import (
    LAYOUTS as LAYOUTS,
)
from fastattn.testing.cases import (
    both as both,
)
from fastattn.testing.cases import (
    is_ as is_,
)
from fastattn.testing.cases import (
    offsets as offsets,
)
from fastattn.testing.cases import (
    packed as packed,
)
from fastattn.testing.cases import (
    table as table,
)
from fastattn.testing.cases import (
    with_dtype as with_dtype,
)
from fastattn.testing.tolerance import Agreement, agreement, check_close

__all__ = [
    "Agreement", "CASES", "Case", "LARGE_CASES", "Problem", "agreement", "check_close", "lengths", "make_inputs",
    "poison", "run",
]  # fmt: skip

export(globals())
