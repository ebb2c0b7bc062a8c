"""fastattn in models that were written for PyTorch: modules exchanged in place, or their calls redirected."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from fastattn import dispatch
from fastattn.integrations import left_alone
from fastattn.integrations.exchange import InTurn, assign, exchange
from fastattn.integrations.report import Replacement, Report
from fastattn.integrations.sdpa_redirect import Request
from fastattn.integrations.torch.patching import patch
from fastattn.nn import MultiheadAttention

__all__ = ["replace_attention"]

TORCH_MODULE = nn.MultiheadAttention
"""Torch's own class, whatever a patch has put in its place."""

LIBRARIES = (
    ("diffusers", "diffusers.processors"),
    ("torchvision", "vision.swin"),
    ("timm", "vision.replacement"),
    ("torchvision", "vision.replacement"),
    ("open_clip", "vision.replacement"),
    ("clip", "vision.replacement"),
    ("x_transformers", "x_transformers"),
)
"""A library, and the module here that knows attention of it: is_known, replace. The first that knows a module has it.
"""


def replace_attention(model: nn.Module, *, backend: str | None = None) -> Report:
    """Let the attention in `model` compute with fastattn, in place.

    What is exchanged: `torch.nn.MultiheadAttention`, wherever it stands (torch's Transformer layers, torchvision's and
    open_clip's vision transformers); attention classes of timm, torchvision, open_clip, clip and x-transformers that
    call torch's attention functions; diffusers' processors; and Hugging Face models, through their attention interface.
    Only classes and switches change: parameters, state_dict, hooks and isinstance checks stay. Whatever else looks like
    attention is left alone, and named in the report with the reason.

    An `nn.TransformerEncoder` stops packing padded batches into nested tensors, which torch does on its C++ path alone;
    padded positions then hold what the ordinary path computes there, not zeros.

    Args:
        model: any module; itself, too, may be an attention module.
        backend: the backend that runs them, by name; None takes the first that can.

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
    glue, request = _glue(modules), Request(patch, backend, [])
    try:
        _replace_transformers(report, model, modules, backend)
        for path, module in modules:
            if isinstance(module, TORCH_MODULE):
                report.add(*_replace_torchs(path, module, backend))
            elif (known := next((each for each in glue if each.is_known(module)), None)) is not None:
                report.add(*known.replace(path, module, request))
    except BaseException:
        report.restore()
        raise
    for path, module in modules:
        if not isinstance(module, nn.TransformerEncoder) or not getattr(module, "use_nested_tensor", False):
            continue
        if any(isinstance(inner, MultiheadAttention) for inner in module.modules()):
            row = Replacement(path, type(module).__name__, True, "no nested tensors for padding", attends=False)
            report.add(row, assign(module, "use_nested_tensor", False))
    for row in left_alone.rows(modules, {row.path for row in report.rows}):
        report.add(row)
    return report


def _glue(modules: list[tuple[str, nn.Module]]) -> list[Any]:
    """The modules of LIBRARIES for the libraries that a model's classes are of; no other is imported."""
    there = {base.__module__.split(".")[0] for kind in {type(module) for _, module in modules} for base in kind.__mro__}
    names = dict.fromkeys(name for library, name in LIBRARIES if library in there)
    return [importlib.import_module(f"fastattn.integrations.{name}") for name in names]


def _replace_transformers(
    report: Report, model: nn.Module, modules: list[tuple[str, nn.Module]], backend: str | None
) -> None:
    """Hugging Face's part, where the model holds anything of theirs."""
    if not any(type(module).__module__.startswith("transformers.") for _, module in modules):
        return
    from fastattn.integrations import transformers

    rows, undo = transformers.replace(model, backend=backend)
    report.rows += rows
    report._undo += undo


def _replace_torchs(
    path: str, module: nn.MultiheadAttention, backend: str | None
) -> tuple[Replacement, Callable[[], None] | None]:
    kind = type(module)
    if isinstance(module, MultiheadAttention):
        if backend is None or backend == module.backend:
            return Replacement(path, kind.__name__, False, "it is fastattn's already"), None
        what = f"it is fastattn's already, now on the backend {backend!r}"
        return Replacement(path, kind.__name__, True, what), assign(module, "backend", backend)
    reason = _why_not(module)
    if reason is not None:
        return Replacement(path, kind.__name__, False, reason), None
    backs = [exchange(module, MultiheadAttention)]
    if backend is not None:
        backs.append(assign(module, "backend", backend))
    return Replacement(path, kind.__name__, True, "fastattn.nn.MultiheadAttention"), InTurn(backs)


def _why_not(module: nn.MultiheadAttention) -> str | None:
    kind = type(module)
    if kind is not TORCH_MODULE:
        does = "has a forward of its own" if kind.forward is not TORCH_MODULE.forward else "is a subclass of torch's"
        return (
            f"{kind.__module__}.{kind.__qualname__} {does}, which an exchange would lose; fastattn.patch() reaches it"
        )
    if "forward" in vars(module):
        return "its forward was replaced on the instance; fastattn.patch() reaches it"
    return None
