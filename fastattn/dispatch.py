"""Which room runs a call: the ordered list, the choice, and the choice explained."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
from dataclasses import dataclass, field
from types import ModuleType

from fastattn.spec import AttnInputs, AttnSpec

BACKENDS = ("cpu", "cuda", "triton", "reference")
"""In order of preference: `backend=None` takes the first that can run."""

_MODULES = {
    "cpu": "fastattn.backends.cpu",
    "cuda": "fastattn.backends.cuda",
    "triton": "fastattn.backends.triton",
    "reference": "fastattn.reference",
}


class BackendUnavailable(RuntimeError):
    """The backend that was asked for exists but cannot run this call; the message says why and what could."""


@dataclass(frozen=True)
class Verdict:
    """What a call would run on, and why not on the others. `str()` is a table."""

    backend: str
    kernel: str
    reasons: dict[str, str | None]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = [f"{'backend':<{width}}  verdict"]
        for name, reason in self.reasons.items():
            chosen = f"runs this call: {self.kernel}" if name == self.backend else "could run this call"
            lines.append(f"{name:<{width}}  {chosen if reason is None else reason}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@functools.cache
def room(name: str) -> ModuleType:
    """The module of a backend: why_not, forward, backward, kernel_name; where there is something to say, also
    needs_asking, prepare (why_not, and whatever must be done before a run), notes (for a verdict), weights (what
    attention_weights returns), READS_BLOCKS and READS_BLOCKS_BACKWARD (whether keys may lie in blocks).
    """
    return importlib.import_module(_MODULES[name])


def requested(backend: str | None) -> str | None:
    """The room asked for by argument or by FASTATTN_BACKEND; None where the choice is free. ValueError if unknown."""
    source = "backend"
    if backend is None:
        backend, source = os.environ.get("FASTATTN_BACKEND") or None, "FASTATTN_BACKEND"
    if backend is not None and backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend).lower(), BACKENDS, 1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise ValueError(f"{source}: unknown backend {backend!r}; there are {', '.join(BACKENDS)}{hint}")
    return backend


def choose(spec: AttnSpec, asked: str | None, *, to_run: bool = False) -> str:
    """The room that runs `spec`; `asked` is what `requested` gave. Builds something only where it is `to_run`.

    Raises:
        BackendUnavailable: a room was asked for that cannot run it. A choice made by name never falls back.
    """
    if asked is None:
        for name in BACKENDS:
            if free_reason(name, spec, to_run=to_run) is None:
                return name
        raise BackendUnavailable("no backend can run this call")
    reason = _reason(asked, spec, to_run)
    if reason is not None:
        others = [name for name in BACKENDS if name != asked and free_reason(name, spec) is None]
        raise BackendUnavailable(
            f"backend {asked!r} cannot run this call: {reason}. "
            f"What can: {', '.join(repr(name) for name in others)}; backend=None chooses"
        )
    return asked


def verdict(spec: AttnSpec, inputs: AttnInputs, backend: str | None, notes: list[str]) -> Verdict:
    """The choice with everybody's reasons; raises as `choose` does."""
    asked = requested(backend)
    name = choose(spec, asked)
    reasons = {each: _reason(each, spec, False) if each == asked else free_reason(each, spec) for each in BACKENDS}
    module = room(name)
    more = module.notes(spec, inputs) if hasattr(module, "notes") else []
    return Verdict(name, module.kernel_name(spec), reasons, [*notes, *more])


def free_reason(name: str, spec: AttnSpec, *, to_run: bool = False) -> str | None:
    """Why a free choice would pass a room by: it cannot run the call, or runs only when asked for by name."""
    needs_asking = getattr(room(name), "needs_asking", None)
    return _reason(name, spec, to_run) or (needs_asking(spec) if needs_asking else None)


def _reason(name: str, spec: AttnSpec, to_run: bool) -> str | None:
    module = room(name)
    if spec.pages is not None and not getattr(module, "READS_BLOCKS", False):
        return "keys in blocks are not read in place here, and nothing is copied in silence"
    if spec.pages is not None and spec.needs_grad and not getattr(module, "READS_BLOCKS_BACKWARD", False):
        return "keys in blocks are read forward only here; torch.no_grad() leaves the gradients out"
    prepare = getattr(module, "prepare", None) if to_run else None
    return module.why_not(spec) if prepare is None else prepare(spec)
