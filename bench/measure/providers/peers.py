"""Other libraries as providers: FlashAttention 2, 3 and 4, and xformers, where they can be imported.

They need not be installed: wheels unpacked into one folder are found there, by PEERS= in the environment or `--peers`.
The folder comes last on sys.path, so that nothing in it stands before what is installed.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from fastattn.bench.cases.workload import Made, Workload
from fastattn.bench.measure.providers.base import Provider
from fastattn.masks import Causal, Full, Window

FOLDER = "PEERS"
HALF = ("fp16", "bf16")
UNBOUNDED = -1


def look_in(folder: Path) -> None:
    """Find peers in `folder` too, here and in child processes. ValueError where it is none."""
    if not folder.is_dir():
        raise ValueError(f"peers: {folder} is no folder; it holds wheels of other libraries, unpacked")
    os.environ[FOLDER] = str(folder.resolve())


def found() -> list[str]:
    """Names of the peers that can be imported here."""
    return [name for name, peer in PEERS.items() if isinstance(peer.module(), ModuleType)]


class Peer(Provider):
    """A library's function on tensors with the heads after the length, the layout all of these take."""

    name: str
    modules: tuple[str, ...]
    """By any of these names the library goes; the first that can be imported is taken."""
    dtypes = HALF
    devices = ("cuda",)
    most_head_dim = 256

    def module(self) -> ModuleType | str:
        """The library, or a sentence why it is not there."""
        folder = os.environ.get(FOLDER)
        if folder and folder not in sys.path:
            sys.path.append(folder)
        reasons = []
        for name in self.modules:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as failure:
                # A part that it needs may be what is missing.
                missing = failure.name or ""
                if not name.startswith(missing):
                    reasons.append(f"{name} needs {missing}, which is not installed")
            except Exception as failure:
                reasons.append(
                    f"{name}: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
                )
        return reasons[0] if reasons else f"no module {' or '.join(self.modules)}"

    def why_not(self, workload: Workload, mode: str) -> str | None:
        case = workload.case
        if workload.device.type not in self.devices:
            return f"needs {' or '.join(self.devices).upper()}"
        if case.dtype not in self.dtypes:
            return f"no {case.dtype}"
        if case.head_dim > self.most_head_dim or case.head_dim % 8:
            return f"no head dim {case.head_dim}"
        if not isinstance(workload.mask, (Full, Causal, Window)):
            return f"no {type(workload.mask).__name__} mask"
        reason = super().why_not(workload, mode)
        if reason is not None:
            return reason
        module = self.module()
        return module if isinstance(module, str) else self.cannot(module, workload, mode)

    def cannot(self, module: ModuleType, workload: Workload, mode: str) -> str | None:
        """What this library, once it is there, does not do."""
        return None


class FlashAttention(Peer):
    """flash_attn_func(query, key, value, causal=, window_size=). Its masks lie bottom-right, windows hold both ends."""

    unbounded: int | None = UNBOUNDED
    forward_only: tuple[str, ...] = ()
    """Module names under which the library is a forward without gradients, and without windows."""

    def __init__(self, name: str, modules: tuple[str, ...], **differs: Any):
        self.name, self.modules = name, modules
        vars(self).update(differs)

    def cannot(self, module: ModuleType, workload: Workload, mode: str) -> str | None:
        if module.__name__ in self.forward_only:
            if mode != "fwd":
                return f"no backward in {module.__name__}"
            if isinstance(workload.mask, Window):
                return f"no window in {module.__name__}"
        return None if hasattr(module, "flash_attn_func") else f"{module.__name__} has no flash_attn_func"

    def make(self, workload: Workload, mode: str) -> Made:
        module = self.module()
        attend: Callable[..., Any] = module.flash_attn_func  # type: ignore[union-attr]
        mask, options = workload.mask, {}
        if isinstance(mask, Causal):
            options["causal"] = True
        elif isinstance(mask, Window):
            bounds = (mask.left, mask.right)
            options["window_size"] = tuple(self.unbounded if each is None else each for each in bounds)

        def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = attend(query, key, value, **options)
            return out[0] if isinstance(out, tuple) else out  # some versions return lse too

        return Made(forward, module.__name__, layout="blhd")  # type: ignore[union-attr]


class Xformers(Peer):
    """xformers.ops.memory_efficient_attention, its own choice of kernel."""

    name = "xformers"
    modules = ("xformers.ops",)
    dtypes = (*HALF, "fp32")

    def cannot(self, module: ModuleType, workload: Workload, mode: str) -> str | None:
        if isinstance(workload.mask, Window) and workload.mask.right is None:
            return "no window without an end"
        if mode != "fwd" and workload.case.num_heads != workload.case.num_kv_heads:
            return "no backward with shared key heads"
        return None

    def make(self, workload: Workload, mode: str) -> Made:
        module, case, mask = self.module(), workload.case, workload.mask
        biases = module.fmha.attn_bias  # type: ignore[union-attr]
        bias = None
        if isinstance(mask, Causal):
            bias = biases.LowerTriangularFromBottomRightMask()
        elif isinstance(mask, Window):
            left = case.kv_len if mask.left is None else mask.left
            bias = biases.LocalAttentionFromBottomRightMask(window_left=left, window_right=mask.right)
        attend = module.memory_efficient_attention  # type: ignore[union-attr]
        group = case.num_heads // case.num_kv_heads

        def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if group == 1:
                return attend(query, key, value, attn_bias=bias)
            # Shared heads are a dimension of their own, which the keys repeat without a copy.
            grouped = query.unflatten(2, (-1, group))
            both = (each.unsqueeze(3).expand(-1, -1, -1, group, -1) for each in (key, value))
            return attend(grouped, *both, attn_bias=bias).flatten(2, 3)

        return Made(forward, "xformers", layout="blhd")


PEERS: dict[str, Peer] = {
    each.name: each
    for each in (
        FlashAttention("fa2", ("flash_attn",)),
        FlashAttention("fa3", ("flash_attn_interface", "fa3_fwd_interface"), forward_only=("fa3_fwd_interface",)),
        FlashAttention("fa4", ("flash_attn.cute",), unbounded=None),
        Xformers(),
    )
}
