"""fastattn in models that were written for PyTorch: modules exchanged in place, or functions caught while they run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.overrides import TorchFunctionMode

from fastattn import dispatch, mha, sdpa
from fastattn.nn import MultiheadAttention

__all__ = ["Replacement", "Report", "patch", "replace_attention"]

TORCH_MODULE = nn.MultiheadAttention
"""Torch's own class, whatever a patch has put in its place."""


class patch(ContextDecorator, TorchFunctionMode):
    """`with fastattn.patch():` runs torch's attention functions on fastattn, in code that need not know of it.

    `F.scaled_dot_product_attention` and `F.multi_head_attention_forward` called within, by whatever name they were
    imported, are computed by fastattn; so are `nn.MultiheadAttention` and the Transformer layers, whose C++ paths torch
    switches off under such a mode. Nothing is monkeypatched, and other threads are not affected. What `torch.compile`
    made takes the mode in when it is called within. Also a decorator.

    Args:
        backend: the room that runs them, by name; None takes the first that can.

    Raises:
        ValueError: an unknown backend.
    """

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        dispatch.requested(backend)
        self.backend = backend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is sdpa.TORCH_SDPA:
            return sdpa.route(*args, **kwargs, backend=self.backend)
        if func is mha.TORCH_MHA:
            return mha.forward(*args, **kwargs, backend=self.backend)
        return func(*args, **kwargs)


class Replacement(NamedTuple):
    """One row of a report: the module's path, its class, whether it was changed, and how or why not."""

    path: str
    module: str
    changed: bool
    what: str


class Report:
    """What `replace_attention` did. `str()` is a table, `restore()` undoes it, `len()` counts the exchanged modules."""

    def __init__(self) -> None:
        self.rows: list[Replacement] = []
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return sum(row.changed and row.module == TORCH_MODULE.__name__ for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return (
                "no torch.nn.MultiheadAttention found; attention that calls F.scaled_dot_product_attention itself "
                "runs on fastattn inside fastattn.patch()"
            )
        head = Replacement("path", "module", False, "")
        path, module = (max(len(str(row[column])) for row in (head, *self.rows)) for column in (0, 1))
        lines = [f"{'path':<{path}}  {'module':<{module}}  changed  what"]
        for row in self.rows:
            lines.append(f"{row.path:<{path}}  {row.module:<{module}}  {'yes' if row.changed else 'no':<7}  {row.what}")
        return "\n".join(lines)

    def restore(self) -> None:
        """Put back what was changed. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


def replace_attention(model: nn.Module, *, backend: str | None = None) -> Report:
    """Let every `torch.nn.MultiheadAttention` in `model` compute with fastattn, in place.

    Only the class of each module changes: parameters, state_dict, hooks and isinstance checks stay. An
    `nn.TransformerEncoder` stops packing padded batches into nested tensors, which torch does on its C++ path alone;
    padded positions then hold what the ordinary path computes there, not zeros.

    Args:
        model: any module; itself, too, may be an attention module.
        backend: the room that runs them, by name; None takes the first that can.

    Returns:
        A report, with a row for each module that was changed or passed by, and `restore()`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown backend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: a torch.nn.Module is needed, got {type(model).__name__}")
    dispatch.requested(backend)
    report = Report()
    modules = list(model.named_modules())
    for path, module in modules:
        if isinstance(module, TORCH_MODULE):
            _replace(report, path, module, backend)
    for path, module in modules:
        if not isinstance(module, nn.TransformerEncoder) or not getattr(module, "use_nested_tensor", False):
            continue
        if any(isinstance(inner, MultiheadAttention) for inner in module.modules()):
            module.use_nested_tensor = False
            report.rows.append(Replacement(path, type(module).__name__, True, "no nested tensors for padding"))
            report._undo.append(partial(setattr, module, "use_nested_tensor", True))
    return report


def _replace(report: Report, path: str, module: nn.MultiheadAttention, backend: str | None) -> None:
    kind = type(module)
    reason = _why_not(module)
    if reason is not None:
        report.rows.append(Replacement(path, kind.__name__, False, reason))
        return
    module.__class__ = MultiheadAttention
    if backend is not None:
        module.backend = backend  # type: ignore[assignment]
    report.rows.append(Replacement(path, kind.__name__, True, "fastattn.nn.MultiheadAttention"))

    def undo() -> None:
        module.__class__ = TORCH_MODULE
        if backend is not None:
            del module.backend

    report._undo.append(undo)


def _why_not(module: nn.MultiheadAttention) -> str | None:
    kind = type(module)
    if isinstance(module, MultiheadAttention):
        return "it is fastattn's already"
    if kind is not TORCH_MODULE:
        does = "has a forward of its own" if kind.forward is not TORCH_MODULE.forward else "is a subclass of torch's"
        return (
            f"{kind.__module__}.{kind.__qualname__} {does}, which an exchange would lose; fastattn.patch() reaches it"
        )
    if "forward" in vars(module):
        return "its forward was replaced on the instance; fastattn.patch() reaches it"
    return None
