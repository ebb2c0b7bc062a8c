"""What is looking at us: compilers, functorch transforms, forward-mode differentiation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def functorch_active() -> bool:
    """Inside grad, vmap, jvp, functionalize or the like. Asked while compiling, it is the state of the trace."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# All that torch.compiler.assume_constant_result does, which imports torch._dynamo for it, and that imports triton.
functorch_active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transforms_active() -> bool:
    """Inside a functorch transform or a level of forward-mode differentiation. Compilers guard on both."""
    return forward_ad._current_level >= 0 or functorch_active()


def being_transformed() -> bool:
    """Whether operations must stay plain PyTorch: a custom autograd function would be wrong or refused there."""
    return torch.compiler.is_compiling() or transforms_active()


_recorded = threading.local()


@contextmanager
def recorded_by_jit() -> Iterator[None]:
    """Around an operator that torch.jit.trace records: within it, torch says that nobody traces."""
    _recorded.now = True
    try:
        yield
    finally:
        _recorded.now = False


def being_traced() -> bool:
    """Whether this thread's call is part of a compiler's or tracer's record."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or getattr(_recorded, "now", False)


def holds_many(tensor: Tensor) -> bool:
    """A gradient of torch.autograd.grad(is_grads_batched=True): many tensors in one, whose values cannot be read."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes that are written: an enabled autocast would narrow every matrix product."""
    kind = device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


@contextmanager
def autograd_inside_operator() -> Iterator[None]:
    """Record derivatives within an operator's kernel, where the dispatcher has switched autograd off."""
    keys = torch._C.DispatchKey
    hidden = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        hidden = hidden.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), hidden), torch.enable_grad():
        yield
