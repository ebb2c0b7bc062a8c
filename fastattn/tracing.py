"""What is looking at us: compilers, functorch transforms, forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad


def functorch_active() -> bool:
    """Inside grad, vmap, jvp, functionalize or the like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward_ad_active() -> bool:
    """Inside a level of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def being_transformed() -> bool:
    """Whether operations must stay plain PyTorch: a custom autograd function would be wrong or refused there."""
    return torch.compiler.is_compiling() or functorch_active() or forward_ad_active()


@torch.compiler.assume_constant_result
def transforms_active() -> bool:
    """Whether a functorch or forward-mode transform is running; asked while compiling, it is the state of the trace."""
    return functorch_active() or forward_ad_active()


@contextmanager
def autograd_inside_operator() -> Iterator[None]:
    """Record derivatives within an operator's kernel, where the dispatcher has switched autograd off."""
    keys = torch._C.DispatchKey
    hidden = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        hidden = hidden.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), hidden), torch.enable_grad():
        yield
