"""Torch's own modules on the parameters of ours: what TorchScript compiles and what takes nested tensors."""

from __future__ import annotations

import copy

from torch import nn

EXTRAS = ("window", "num_kv_heads", "backend")


def torchs(module: nn.Module, wanted_by: str) -> nn.Module:
    """Torch's module on the same parameters, buffers and hooks, its children likewise.

    Args:
        module: one of fastattn.nn, or any module that holds some.
        wanted_by: who asks, for a refusal: "torch.jit.script", "a nested tensor".

    Raises:
        RuntimeError: the module does what torch's cannot: a backend by name, a window, fewer key heads, its own code.
    """
    kind = type(module)
    if kind.__module__.startswith(f"{__package__}."):
        for name in EXTRAS:
            value = getattr(module, name, None)
            if value is not None:
                raise RuntimeError(
                    f"{kind.__name__}: {wanted_by} is left to torch's own module, which has no {name}= "
                    f"(here {value!r}); make the module without it, or use torch.jit.trace, torch.compile or "
                    "torch.export"
                )
        kind = next(base for base in kind.__mro__ if base.__module__.startswith("torch."))
    elif isinstance(module, DropIn):
        raise RuntimeError(
            f"{kind.__name__}: {wanted_by} is left to torch's own module, which would lose what this subclass of "
            f"fastattn's adds; use torch.jit.trace, torch.compile or torch.export"
        )
    elif not isinstance(module, nn.ModuleList):
        return module
    copied = copy.copy(module)
    copied.__class__ = kind
    children = {name: None if child is None else torchs(child, wanted_by) for name, child in module._modules.items()}
    copied.__dict__["_modules"] = children
    return copied


class DropIn:
    """Base of the modules that stand for one of torch's: in TorchScript, torch's stands for them."""

    def __prepare_scriptable__(self) -> nn.Module:
        return torchs(self, "torch.jit.script")  # type: ignore[arg-type]
