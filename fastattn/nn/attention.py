"""torch.nn.MultiheadAttention on fastattn: a subclass with the same arguments, parameters, seeds and errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, init

from fastattn import masks
from fastattn.nn.torch_modules import DropIn, torchs
from fastattn.torch_api import mha

Window = int | tuple[int | None, int | None] | None


class MultiheadAttention(DropIn, nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`.

    Args:
        window: truncated attention: (left, right) keys on either side of a query's own position, both ends included,
            None for a side without end; a number stands for both sides. The last query sits at the last key. Keys
            added by add_bias_kv and add_zero_attn are seen from everywhere.
        backend: the backend that runs it, by name; None takes the first that can.
        num_kv_heads: heads of key and value, which num_heads must be a multiple of (grouped or multi-query attention);
            num_heads when None. The parameters for key and value are narrower then: in_proj_weight is
            [(num_heads + 2 * num_kv_heads) * head_dim, embed_dim].
        The rest is torch's.

    The same constructor arguments, state_dict keys and, for a seed, the same initial parameters. There is one path, in
    training and in evaluation, so `is_causal` and masks mean the same in both; a query that sees no key gives weights 0
    where torch gives NaN. Nested tensors are torch's own format: torch's forward computes them. TorchScript cannot hold
    fastattn's operators: `torch.jit.script(model)` puts torch's module on the same parameters in its place, and refuses
    a module with one of the three arguments above. `torch.jit.trace` keeps fastattn's operators.
    """

    # TorchScript would compile a property; the scripted module is torch's, see __prepare_scriptable__.
    __jit_unused_properties__ = ("_qkv_same_embed_dim",)
    backend: str | None = None
    window: tuple[int | None, int | None] | None = None
    num_kv_heads: int | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        window: Window = None,
        backend: str | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        _check_heads(num_heads, num_kv_heads)
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self._extend(window, backend)
        if num_kv_heads is not None and num_kv_heads != num_heads:
            self.num_kv_heads = num_kv_heads
            self._narrow(num_kv_heads * self.head_dim)

    def _extend(self, window: Window, backend: str | None) -> None:
        """Take on what torch's module does not have; an attribute only where it is not the default."""
        if backend is not None:
            self.backend = backend
        if window is not None:
            self.window = _sides(window)

    def _narrow(self, kv_dim: int) -> None:
        """Parameters for keys and values kv_dim wide, in the places and with the start of torch's."""
        wide = self.embed_dim + 2 * kv_dim
        shapes = {
            "in_proj_weight": (wide, self.embed_dim),
            "k_proj_weight": (kv_dim, self.kdim),
            "v_proj_weight": (kv_dim, self.vdim),
            "in_proj_bias": (wide,),
            "bias_k": (1, 1, kv_dim),
            "bias_v": (1, 1, kv_dim),
        }
        for name, shape in shapes.items():
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, Parameter(torch.empty(shape, dtype=old.dtype, device=old.device)))
        self._reset_parameters()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Whether the projections are packed; but False for a module that torch's encoder would pass by.

        In evaluation `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` take torch's C++ path, past this module's
        forward, if it is batch_first with biases, an even number of heads and this attribute; only this one can be said
        no to. Torch's constructor asks, too, before there are biases, and hears the truth.
        """
        passed_by = self.batch_first and self.num_heads % 2 == 0 and self._parameters.get("in_proj_bias") is not None
        return self.__dict__["_qkv_same_embed_dim"] and not passed_by

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, same: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = same

    def _reset_parameters(self) -> None:
        # Torch's, in its order (which a seed's numbers depend on), by what is there and not by _qkv_same_embed_dim.
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            init.constant_(self.in_proj_bias, 0.0)
            init.constant_(self.out_proj.bias, 0.0)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                init.xavier_normal_(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query over key and value, and its weights.

        Args:
            query: [q_len, batch, embed_dim], [batch, q_len, embed_dim] with batch_first, or [q_len, embed_dim].
            key, value: likewise, kv_len long, kdim and vdim wide.
            key_padding_mask: [batch, kv_len] or [kv_len]; bool, True = hidden, or floating, added to the scores.
            need_weights: also return the weights; costs a second pass over the scores.
            attn_mask: [q_len, kv_len] or [batch * num_heads, q_len, kv_len]; likewise.
            average_attn_weights: the weights' mean over heads, else those of each head.
            is_causal: a hint that attn_mask is causal (see `fastattn.multi_head_attention_forward`).

        Returns:
            out, laid out like the query, and the weights [batch, q_len, kv_len] or [batch, num_heads, q_len, kv_len]
            (no batch for an unbatched query), or None.

        Raises:
            AssertionError, RuntimeError, ValueError: as torch does, with its messages.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return torchs(self, "a nested tensor").forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if attn_mask is not None and key_padding_mask is None:  # torch's function trusts is_causal, its module looks
            mha.check_floating_or_bool(attn_mask, "attn_mask")
        in_proj_weight = _held(self, "in_proj_weight")
        out_proj = self._modules["out_proj"]
        packed = in_proj_weight is not None
        return mha.route(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            in_proj_weight,
            _held(self, "in_proj_bias"),
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            _held(out_proj, "weight"),
            _held(out_proj, "bias"),
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not packed,
            q_proj_weight=None if packed else self.q_proj_weight,
            k_proj_weight=None if packed else self.k_proj_weight,
            v_proj_weight=None if packed else self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            batch_first=self.batch_first,
            window=self.window,
            num_kv_heads=self.num_kv_heads,
            backend=self.backend,
        )


def _held(module: Any, name: str) -> Any:
    """A module's parameter, past `__getattr__`, which takes a microsecond; one that is parametrized is not held."""
    held = module._parameters
    return held[name] if name in held else getattr(module, name)


def _check_heads(num_heads: int, num_kv_heads: int | None) -> None:
    if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(
            f"num_kv_heads: num_heads ({num_heads}) must be a multiple of it, got {num_kv_heads!r}; "
            f"1 to {num_heads} are possible, such as {num_heads} (ordinary) and 1 (multi-query)"
        )


def _sides(window: Window) -> tuple[int | None, int | None]:
    """The window as (left, right), as `fastattn.masks.Window` checks them."""
    sides = (window, window) if isinstance(window, int) else window
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise ValueError(f"window: (left, right), one number for both, or None is needed, got {window!r}")
    mask = masks.Window(*sides)
    return mask.left, mask.right
