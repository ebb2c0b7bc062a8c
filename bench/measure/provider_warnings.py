"""What libraries warn of while they are made, checked and timed: kept once, by provider, and not on the screen.

PyTorch's C++ warnings come through Python's `warnings` too; "cuDNN attention kernel not used because:" is one.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator

TRIGGERED = re.compile(r"\s*\(Triggered internally at .*\)\s*$", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
SAYS_NOTHING = re.compile(r"not used because:$|has been runtime disabled\.?$")
"""PyTorch's heading above the reason, and its word on the kernels that were not asked for."""
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""Python does not show these by default, for no user can do anything about them."""
LONGEST = 200


class Notices:
    """`into`: the list of each provider, which every sentence joins once. `turn` names the one that is at work."""

    def __init__(self, into: dict[str, list[str]]):
        self.into = into
        self.who: str | None = None

    def turn(self, who: str) -> None:
        self.who = who

    @contextlib.contextmanager
    def listening(self, who: str | None = None) -> Iterator[None]:
        """Hear all that `who` warns of. Without a name, in turns, each place in the code once, which costs no time."""
        self.who = who
        with warnings.catch_warnings():
            warnings.simplefilter("default" if who is None else "always")
            for category in FOR_DEVELOPERS:
                warnings.simplefilter("ignore", category)
            warnings.showwarning = self._hear
            yield

    def _hear(self, message: Warning | str, *where: object) -> None:
        heard = sentence(str(message))
        if heard is not None and self.who is not None and heard not in self.into[self.who]:
            self.into[self.who].append(heard)


def sentence(message: str) -> str | None:
    """The first sentence of a warning, without the place in PyTorch's sources; None where it says nothing by itself."""
    text = TRIGGERED.sub("", message.strip())
    first = SENTENCE_END.split(" ".join(text.split()))[0]
    if not first or SAYS_NOTHING.search(first):
        return None
    return first if len(first) <= LONGEST else first[: LONGEST - 1] + "…"
