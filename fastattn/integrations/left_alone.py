"""Modules that look like attention and were left alone: named, so that nobody takes them for exchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fastattn.integrations import sdpa_redirect
from fastattn.integrations.report import Replacement

SPEAK = ("torch", "fastattn", "transformers", "builtins")
"""Packages whose modules have said all they have to, or hold none."""
LOOKS = ("attention", "attn")
PARTS = ("drop", "norm", "pool", "bias", "embed", "mask", "act")
"""Words in the name of what stands near attention and is none."""
HEADS = ("heads", "n_head")
"""How the names of what attention of another name has end, such as ConViT's GPSA."""


def rows(modules: Iterable[tuple[str, nn.Module]], told: set[str]) -> Iterator[Replacement]:
    """A row for each module that seems to compute attention, apart from those whose path was told already."""
    for path, module in modules:
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            if any(word in module.original_name.lower() for word in LOOKS):
                what = "it is scripted, and runs what it was compiled from; torch.jit.trace keeps fastattn's operators"
                yield Replacement(path, module.original_name, False, what)
            continue
        if path in told or all(base.__module__.split(".")[0] in SPEAK for base in kind.__mro__):
            continue
        where = f"{kind.__module__}.{kind.__qualname__}"
        names = sdpa_redirect.names_reached(kind)
        called = sorted(names & sdpa_redirect.CALLS)
        if called:
            what = f"{where} is not known here; it calls {called[0]}, which fastattn.patch() catches"
            yield Replacement(path, kind.__name__, False, what)
        elif seems_to_attend(module, names) and not _above_another(path, told):
            what = f"{where} is not known here, and its forward calls none of torch's attention functions"
            yield Replacement(path, kind.__name__, False, what)


def seems_to_attend(module: nn.Module, names: frozenset[str]) -> bool:
    """By the name of its class; or as it has heads and takes a softmax."""
    if any(_looks_like_attention(base.__name__.lower()) for base in type(module).__mro__):
        return True
    return bool(names & sdpa_redirect.OWN_WAY) and any(name.endswith(HEADS) for name in vars(module))


def _looks_like_attention(name: str) -> bool:
    return any(word in name for word in LOOKS) and not any(word in name for word in PARTS)


def _above_another(path: str, told: set[str]) -> bool:
    start = f"{path}." if path else ""
    return any(other.startswith(start) and other != path for other in told)
