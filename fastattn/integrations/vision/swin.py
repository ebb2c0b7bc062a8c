"""torchvision's Swin (Liu et al. 2021; v2: 2022): its windowed attention, which torchvision writes out with a softmax.

The formula is written anew here, so a torchvision whose function takes other arguments than the ones known is left
alone. Windows are folded into the batch; the relative position bias is fastattn's bias. In a shifted layer the -100
that torchvision adds between parts that are no neighbours is added too, which takes a bias for each window of each
image.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.functional import attention
from fastattn.integrations.exchange import Assigned, InTurn, assign, exchange
from fastattn.integrations.report import ALREADY, Replacement
from fastattn.integrations.sdpa_redirect import Request

HOME = "torchvision.models.swin_transformer"
KNOWN = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
TAKES = (
    "input", "qkv_weight", "proj_weight", "relative_position_bias", "window_size", "num_heads", "shift_size",
    "attention_dropout", "dropout", "qkv_bias", "proj_bias", "logit_scale", "training",
)  # fmt: skip
APART = -100.0
"""What torchvision adds to scores between tokens that a shift has brought side by side."""


def is_known(module: nn.Module) -> bool:
    """Whether a module is torchvision's windowed attention, exchanged already or not."""
    kind = type(module)
    return isinstance(module, OnFastattn) or (kind.__module__ == HOME and kind.__name__ in KNOWN)


def replace(path: str, module: Any, request: Request) -> tuple[Replacement, Callable[[], None] | None]:
    """The row for such a module, exchanged where it can be, and what takes it back."""
    kind: Any = type(module)
    backend = request.backend
    row = partial(Replacement, path, kind.__name__)
    if isinstance(module, OnFastattn):
        if backend is None or backend == module.fastattn_backend:
            return row(False, ALREADY), None
        moved = assign(module, "fastattn_backend", backend)
        return row(True, f"{ALREADY}, now on the backend {backend!r}"), moved
    if "forward" in vars(module):
        return row(False, "its forward was replaced on the instance"), None
    function = getattr(sys.modules[HOME], "shifted_window_attention", None)
    if function is None or tuple(inspect.signature(function).parameters) != TAKES:
        return row(False, "this torchvision's windowed attention takes other arguments than the ones known here"), None
    back = exchange(module, exchanged(kind))
    if backend is not None:
        module.fastattn_backend = backend
    undo = InTurn([back, Assigned(module, "fastattn_backend", False, None)])
    return row(True, "its formula on fastattn.attention, windows in the batch"), undo


class OnFastattn:
    """Base of the classes that `exchanged` makes."""

    fastattn_backend: str | None = None

    def forward(self: Any, x: Tensor) -> Tensor:
        """Attention within windows of x, [batch, height, width, channels], shifted by the module's shift_size."""
        return window_attention(self, x, self.fastattn_backend)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (_blank, (type(self).__mro__[2],), *made[2:])


@cache
def exchanged(kind: Any) -> type:
    """torchvision's class with our forward; its name included."""
    return type(kind.__name__, (OnFastattn, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _blank(kind: type) -> Any:
    return object.__new__(exchanged(kind))


def window_attention(module: Any, x: Tensor, backend: str | None) -> Tensor:
    """What torchvision's `shifted_window_attention` computes for one of its modules.

    Args:
        module: a ShiftedWindowAttention or ShiftedWindowAttentionV2.
        x: [batch, height, width, channels].
        backend: the backend, by name; None takes the first that can.

    Returns:
        As x.
    """
    batch, height, width, channels = x.shape
    rows, columns = module.window_size
    x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    down, across = x.shape[1] // rows, x.shape[2] // columns
    # One window has nothing to be shifted against.
    shift = [0 if count == 1 else size for count, size in zip((down, across), module.shift_size, strict=True)]
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    tokens = _windows(x, rows, columns)  # [batch * windows, rows * columns, channels]

    logit_scale = getattr(module, "logit_scale", None)
    qkv_bias = module.qkv.bias
    if logit_scale is not None and qkv_bias is not None:  # keys have none
        q_bias, k_bias, v_bias = qkv_bias.chunk(3)
        qkv_bias = torch.cat([q_bias, torch.zeros_like(k_bias), v_bias])
    qkv = F.linear(tokens, module.qkv.weight, qkv_bias).unflatten(-1, (3, module.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scale = None
    if logit_scale is not None:
        query = F.normalize(query, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp()
        query, key, scale = query.to(value.dtype), F.normalize(key, dim=-1).to(value.dtype), 1.0
    bias = module.get_relative_position_bias()
    if any(shift):
        apart = _parts(x, shift, rows, columns)
        bias = (bias + apart[:, None]).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    dropout_p = module.attention_dropout if module.training else 0.0
    out: Tensor = attention(  # type: ignore[assignment]
        query, key, value, bias=bias, scale=scale, dropout_p=dropout_p, backend=backend
    )
    out = F.linear(out.transpose(1, 2).flatten(2), module.proj.weight, module.proj.bias)
    out = F.dropout(out, p=module.dropout, training=module.training)

    out = out.view(batch, down, across, rows, columns, channels).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if any(shift):
        out = out.roll((shift[0], shift[1]), (1, 2))
    return out[:, :height, :width].contiguous()


def _windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """[batch, height, width, channels] as [batch * windows, rows * columns, channels]."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // rows, rows, width // columns, columns, channels)
    return x.transpose(2, 3).reshape(-1, rows * columns, channels)


def _parts(x: Tensor, shift: list[int], rows: int, columns: int) -> Tensor:
    """APART between tokens of a window that come from different parts of the picture, [windows, tokens, tokens]."""
    marks = []
    for length, window, moved in zip(x.shape[1:3], (rows, columns), shift, strict=True):
        place = torch.arange(length, device=x.device)
        marks.append((place >= length - window).int() + (place >= length - moved).int() * bool(moved))
    part = marks[0][:, None] * 3 + marks[1][None]
    part = _windows(part[None, ..., None], rows, columns)[..., 0]
    return torch.where(part[:, None] == part[..., None], 0.0, APART).to(x.dtype)
