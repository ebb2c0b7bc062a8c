"""Opaque ints: numbers that Triton cannot specialise on, so that they make no other kernel.

Triton makes a constant of an int that is 1 and marks one that 16 divides; inside a tuple it cannot be told not to
(3.6 to 3.9), and each new kind of number is a new compilation. So lengths, offsets and the like travel as 4 n + 2,
which is neither, and are read back where a kernel begins. Beyond 2^29 it takes 64 bits, another kernel.
"""

import triton
import triton.language as tl


def opaque(number: int) -> int:
    """A number as it travels."""
    return 4 * number + 2


@triton.jit
def from_opaque(number):
    """The number again, of the width it travelled in."""
    return number >> 2


def opaque_strides(strides: tuple[int, ...]) -> tuple:
    """Four strides as they travel: as they are where 16 divides all but the last, so that rows can be read in vectors;
    else all but the last in one opaque tuple.

    That tuple has a fourth number, which nobody reads. Triton (3.6 to 3.9) names the instances of a jit function by the
    types of its arguments with all tuples flattened: ((a, b, c), d) and (a, b, c, d) would be one instance, and the one
    that is met second would be read like the first.
    """
    *steps, last = strides
    return tuple(strides) if all(step % 16 == 0 for step in steps) else ((*map(opaque, steps), opaque(0)), last)


@triton.jit
def stride(strides, AXIS: tl.constexpr):
    """One of them again."""
    if len(strides) == 4:
        return strides[AXIS]
    elif AXIS == 3:
        return strides[1]
    else:
        return from_opaque(strides[0][AXIS])
