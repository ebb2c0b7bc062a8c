"""Numbers that make no other kernel.

Triton makes a constant of an int that is 1 and marks one that 16 divides; inside a tuple it cannot be told not to
(3.6 to 3.9), and each new kind of number is a new compilation. So lengths, offsets and the like travel as 4 n + 2,
which is neither, and are read back where a kernel begins. Beyond 2^29 it takes 64 bits, another kernel.
"""

import triton
import triton.language as tl  # noqa: F401 - the interpreter asks every jitted function for it


def veil(number: int) -> int:
    """As it travels."""
    return 4 * number + 2


@triton.jit
def unveil(number):
    """The number again, of the width it travelled in."""
    return number >> 2
