"""Writes wgmma/: the PTX half of each wgmma, one file an N, where this file is run: `python generate_wgmma.py`.

A test holds the checked-in files against what this would write.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

SIZES = (64, 80, 96, 112, 128, 144, 160, 176, 192, 256)
"""The Ns that the tiles of the kernels have, as BLOCK_N or as a head dimension."""

TYPES = ("bf16", "f16")
FOLDER = Path(__file__).resolve().parent / "wgmma"
WIDTH = 120


def wrapped(text: str, indent: int) -> str:
    """Operands over several lines, each indented."""
    return textwrap.fill(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def quoted(text: str, indent: int) -> str:
    """The same within string literals."""
    lines = textwrap.wrap(text, WIDTH - indent - 3)
    return "\n".join(f'{" " * indent}"{line}{" " * (line != lines[-1])}"' for line in lines)


def function(n: int, kind: str, registers: bool) -> str:
    """One instruction: A in registers (rs) or behind a descriptor (ss)."""
    count = n // 2
    d = ", ".join(f"%{i}" for i in range(count))
    at = count
    if registers:
        a = "{" + ", ".join(f"%{at + i}" for i in range(4)) + "}"
        at += 4
    else:
        a = f"%{at}"
        at += 1
    b, accumulate, majors = at, at + 1, ", ".join(f"%{at + 2 + i}" for i in range(1 if registers else 2))
    template = "int B" if registers else "int A, int B"
    parameter = "const uint32_t (&a)[4]" if registers else "uint64_t a"
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if registers else '"l"(a)'
    immediates = '"n"(B)' if registers else '"n"(A), "n"(B)'
    name = f"{kind}_{'rs' if registers else 'ss'}"
    instruction = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""\
  template <{template}>
  DEVICE static void {name}(float (&d)[{count}], {parameter}, uint64_t b, bool accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{accumulate}, 0;\\n"
        "{instruction} {{"
{quoted(d, 8)}
        "}}, {a}, %{b}, p, 1, 1, {majors};\\n}}\\n"
{wrapped(": " + outputs, 8)}
        : {inputs}, "l"(b), "r"(static_cast<int>(accumulate)), {immediates});
  }}
"""


def variant(n: int) -> str:
    """The file of one N."""
    body = "\n".join(function(n, kind, registers) for kind in TYPES for registers in (False, True))
    return f"""\
// Written by generate_wgmma.py. PTX ISA: wgmma.mma_async, m64n{n}k16.
#pragma once

#include "family.h"

namespace fastattn::arch {{

template <>
struct WgmmaVariant<{n}> {{
{body}}};

}}  // namespace fastattn::arch
"""


def files() -> dict[str, str]:
    """Name and text of each file."""
    includes = "\n".join(f'#include "n{n}.h"' for n in sorted(SIZES, key=str))
    family = """\
// Written by generate_wgmma.py. What each N specialises: functions bf16_ss, bf16_rs, f16_ss, f16_rs; A and B are 1
// where the operand is contiguous along m or n, 0 along k.
#pragma once

#include "../dialect.h"

namespace fastattn::arch {

template <int N>
struct WgmmaVariant;

}  // namespace fastattn::arch
"""
    variants = f"// Written by generate_wgmma.py. Every N.\n#pragma once\n\n{includes}\n"
    return {"family.h": family, "variants.h": variants} | {f"n{n}.h": variant(n) for n in SIZES}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text)
