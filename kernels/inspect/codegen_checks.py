"""What the kernels must compile to. A failed check is a failed build."""

from collections.abc import Callable
from typing import NamedTuple

from fastattn.kernels.inspect.compile import TILES_OF, Compiled


class CodegenCheck(NamedTuple):
    """One promise, about the rows that it concerns."""

    words: str
    concerns: Callable[[Compiled], bool]
    holds: Callable[[Compiled], bool]


def _compiles(row: Compiled) -> bool:
    return row.error is None


def _has_own_tiles(row: Compiled) -> bool:
    """Not what is compiled for a target for which Triton may fail and whose tiles are another's."""
    return row.problem.target not in TILES_OF


def _is_default(row: Compiled) -> bool:
    """The kernels that people meet first, on Hopper."""
    job = row.problem
    return (
        _compiles(row)
        and (job.target, job.form) == ("sm90", "bare")
        and job.kernel in ("fwd", "dq", "dkv")
        and job.head_dim in (64, 128)
        and job.dtype in ("bf16", "fp16")
    )


def _main_loop_has(name: str) -> Callable[[Compiled], bool]:
    return lambda row: row.main is not None and row.main.counts.get(name, 0) > 0


CODEGEN_CHECKS = (
    CodegenCheck("compiles", _has_own_tiles, _compiles),
    CodegenCheck("shared memory fits the target", _has_own_tiles, lambda row: row.shared_bytes <= row.shared_limit),
    CodegenCheck("HGMMA in the main loop", _is_default, _main_loop_has("HGMMA")),
    CodegenCheck("UTMALDG in the main loop", _is_default, _main_loop_has("UTMALDG")),
    CodegenCheck("nothing is spilled", _is_default, lambda row: row.spilled_bytes == 0),
)


def figure(row: Compiled) -> str:
    """What chose a row of the tile table that has not been timed: of its first case in compile.table_plan."""
    clocks = row.main.clocks if row.main is not None else None
    bound = f", {clocks['bound']:.0%}" if clocks else ""
    return f"{row.registers} registers, {row.spilled_bytes} B{bound}"


def failed_checks(row: Compiled) -> list[str]:
    """The checks that a row fails, in words."""
    return [check.words for check in CODEGEN_CHECKS if check.concerns(row) and not check.holds(row)]
