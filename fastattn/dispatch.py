"""Which backends run a call, forward and backward: the ordered list, the choice, and the choice explained."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from fastattn.spec import AttnInputs, AttnSpec

if TYPE_CHECKING:
    from fastattn import reference
    from fastattn.backends import cpu, cuda, triton
    from fastattn.backends.protocol import Backend

    _ALL: tuple[Backend, ...] = (cpu, cuda, triton, reference)

BACKENDS = ("cpu", "cuda", "triton", "reference")
"""In order of preference; see `choose`."""

_MODULES = {
    "cpu": "fastattn.backends.cpu",
    "cuda": "fastattn.backends.cuda",
    "triton": "fastattn.backends.triton",
    "reference": "fastattn.reference",
}

Pair = tuple[str, str | None]
"""The backends of a call's forward and of its backward, None where no gradients are wanted. All keep the same numbers
between the passes (out, lse, dropout's bits), so that any two go together."""


class BackendUnavailable(RuntimeError):
    """The backend that was asked for exists but cannot run this call; the message says why and what could."""


@dataclass(frozen=True)
class Verdict:
    """What a call would run on, and why not on the others. `str()` is a table.

    `backend` runs the forward, `backward` the backward; that is None where no gradients are wanted, and then
    `backward_reasons` is empty. `kernels` are those of the forward and of the backward. Of each backend, `reasons` say
    why it cannot run the forward, `backward_reasons` why it cannot run the backward; None: it can.
    """

    backend: str
    backward: str | None
    kernels: tuple[str, ...]
    reasons: dict[str, str | None]
    backward_reasons: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def kernel(self) -> str:
        """The kernels of both passes."""
        return ", ".join(dict.fromkeys(self.kernels))

    def of(self, name: str) -> str:
        """What a backend does for this call, could do, or why it does nothing."""
        reason, lacks = self.reasons[name], self.backward_reasons.get(name)
        if name == self.backend and self.backward in (None, name):
            return f"runs this call: {self.kernel}"
        if name == self.backend:
            return f"runs the forward: {self.kernels[0]}; {lacks}"
        if name == self.backward:
            return f"runs the backward: {self.kernels[1]}"
        return reason or (f"could run the forward; {lacks}" if lacks else "could run this call")

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = [f"{'backend':<{width}}  verdict", *(f"{name:<{width}}  {self.of(name)}" for name in self.reasons)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@functools.cache
def load(name: str) -> Backend:
    """The module of a backend."""
    return cast("Backend", importlib.import_module(_MODULES[name]))


def requested(backend: str | None) -> str | None:
    """The backend asked for by argument or by FASTATTN_BACKEND; None: the choice is free. ValueError if unknown."""
    source = "backend"
    if backend is None:
        backend, source = os.environ.get("FASTATTN_BACKEND") or None, "FASTATTN_BACKEND"
    if backend is not None and backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend).lower(), BACKENDS, 1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise ValueError(f"{source}: unknown backend {backend!r}; there are {', '.join(BACKENDS)}{hint}")
    return backend


def choose(spec: AttnSpec, asked: str | None, *, to_run: bool = False) -> Pair:
    """The backends that run `spec`: the forward goes to the first that can run the call, the backward to the first of
    those whose backward can. `asked` is what `requested` gave; a backend asked for runs both. Builds something only
    where it is `to_run`.

    Raises:
        BackendUnavailable: a backend was asked for that cannot run both. A choice made by name never falls back.
    """
    forward = reason = None
    for name in BACKENDS if asked is None else (asked,):
        reason = free_reason(name, spec, to_run=to_run) if asked is None else _reason(name, spec, to_run, by_name=True)
        if reason is not None:
            continue
        forward = forward or name
        if not spec.needs_grad:
            return forward, None
        reason = _backward_reason(name, spec)
        if reason is None:
            return forward, name
    if asked is None:
        raise BackendUnavailable("no backend can run this call")
    raise BackendUnavailable(f"backend {asked!r} cannot run this call: {reason}. {_instead(spec, asked, forward)}")


def verdict(spec: AttnSpec, inputs: AttnInputs, backend: str | None, notes: list[str]) -> Verdict:
    """The choice with everybody's reasons; raises as `choose` does."""
    asked = requested(backend)
    forward, backward = choose(spec, asked)
    reasons = {each: _reason(each, spec, False) if each == asked else free_reason(each, spec) for each in BACKENDS}
    backward_reasons: dict[str, str | None] = {}
    kernels = [load(forward).kernel_name(spec)]
    if backward is not None:
        backward_reasons = {each: reason or _backward_reason(each, spec) for each, reason in reasons.items()}
        kernels.append(load(backward).kernel_name_backward(spec))
    for name in dict.fromkeys((forward, backward or forward)):
        notes = [*notes, *load(name).notes(spec, inputs)]
    return Verdict(forward, backward, tuple(kernels), reasons, backward_reasons, notes)


def free_reason(name: str, spec: AttnSpec, *, to_run: bool = False) -> str | None:
    """Why a free choice would pass a backend by: it cannot run the call, or runs only when asked for by name."""
    return _reason(name, spec, to_run) or load(name).needs_asking(spec)


def _reason(name: str, spec: AttnSpec, to_run: bool, *, by_name: bool = False) -> str | None:
    """Why a backend cannot run a call, its gradients apart. `by_name`: it was asked for, and nothing else runs it."""
    module = load(name)
    if spec.pages is not None and not module.READS_BLOCKS:
        return "keys in blocks are not read in place here, and nothing is copied in silence"
    return module.prepare(spec, by_name=by_name) if to_run else module.why_not(spec)


def _backward_reason(name: str, spec: AttnSpec) -> str | None:
    """Why a backend that can run a call cannot run its backward."""
    module = load(name)
    if not module.HAS_BACKWARD:
        return "its backward does not exist yet"
    if spec.pages is not None and not module.READS_BLOCKS_BACKWARD:
        return "keys in blocks are read forward only here"
    return module.why_not_backward(spec)


def _instead(spec: AttnSpec, asked: str, runs_forward: str | None) -> str:
    """What to do where a backend was asked for in vain: who can, what a free choice takes, what it can itself."""
    free = "backend=None without FASTATTN_BACKEND" if os.environ.get("FASTATTN_BACKEND") else "backend=None"
    forward, backward = choose(spec, None)
    if runs_forward and forward == asked:
        free = f"{free} runs this very forward with {backward!r} as backward"
    else:
        can = [each for each in BACKENDS if each != asked and free_reason(each, spec) is None]
        if spec.needs_grad:
            can = [each for each in can if _backward_reason(each, spec) is None]
        free = f"What can: {', '.join(map(repr, can))}; {free} chooses"
    return f"{free}; under torch.no_grad() {asked!r} runs it" if runs_forward else free
