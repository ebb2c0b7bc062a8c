"""The Transformer modules of torch.nn on fastattn: subclasses with the same arguments, parameters, seeds and numbers.

The forward of every module always runs, in training and in evaluation: torch's C++ path, which passes the attention
module and every hook by, is not taken, and padding is never packed into nested tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import tracing
from fastattn.nn.attention import MultiheadAttention, Window
from fastattn.nn.torch_modules import DropIn, torchs

Activation = str | Callable[[Tensor], Tensor]


class _Layer(DropIn):
    """What the two layers share: torch's arguments and ours, of which each attention gets its own."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        window: Window = None,
        backend: str | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]  # torch's layer, which comes next in each subclass
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        # Memory, which a decoder's other attention sees, has no positions to compare with.
        for name, own_window in (("self_attn", window), ("multihead_attn", None)):
            if hasattr(self, name):
                setattr(self, name, extended(getattr(self, name), own_window, backend, num_kv_heads))


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """Drop-in for `torch.nn.TransformerEncoderLayer`.

    Args:
        window, backend, num_kv_heads: as `fastattn.nn.MultiheadAttention` takes them. The rest is torch's.

    Bool masks reach the attention as they are; torch makes floating ones of them first.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src through self-attention and the two linear layers.

        Args:
            src: [length, batch, d_model], [batch, length, d_model] with batch_first, or [length, d_model].
            src_mask: [length, length] or [batch * nhead, length, length]; bool, True = hidden, or floating, added.
            src_key_padding_mask: [batch, length] or [length]; likewise.
            is_causal: a hint that src_mask is causal (see `fastattn.multi_head_attention_forward`).

        Returns:
            As src.

        Raises:
            AssertionError, RuntimeError: as torch does where it does not take its C++ path.
        """
        if src.is_nested:
            return torchs(self, "a nested tensor").forward(src, src_mask, src_key_padding_mask, is_causal)
        mask, padding = _one_kind(src_mask, "src_mask", src_key_padding_mask, src.dtype)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """Drop-in for `torch.nn.TransformerDecoderLayer`.

    Args:
        window: of the self-attention; memory has no positions to compare with.
        backend, num_kv_heads: of both attentions, as `fastattn.nn.MultiheadAttention` takes them. The rest is torch's.
    """


class TransformerEncoder(DropIn, nn.TransformerEncoder):
    """Drop-in for `torch.nn.TransformerEncoder`, for layers of fastattn or of one's own.

    Args:
        enable_nested_tensor: kept as an attribute; padding never becomes a nested tensor here, so that padded positions
            hold what the layers compute, in evaluation as in training.
        The rest is torch's. A layer of torch's own is run as it is.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """src through the layers in turn, then the norm.

        Args:
            src, mask, src_key_padding_mask: as the layer takes them.
            is_causal: a hint that the mask is causal; None looks (not while a compiler traces).

        Returns:
            As src.
        """
        if src.is_nested:
            return torchs(self, "a nested tensor").forward(src, mask, src_key_padding_mask, is_causal)
        mask, padding = _one_kind(mask, "mask", src_key_padding_mask, src.dtype)
        causal = _is_causal(mask, is_causal, src, self.layers[0].self_attn.batch_first)
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(DropIn, nn.TransformerDecoder):
    """Drop-in for `torch.nn.TransformerDecoder`, for layers of fastattn or of one's own."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt through the layers in turn, each looking at memory; then the norm.

        Args:
            tgt: [length, batch, d_model], [batch, length, d_model] with batch_first, or [length, d_model].
            memory: likewise, of another length.
            tgt_is_causal: a hint that tgt_mask is causal; None looks (not while a compiler traces).
            The rest as `torch.nn.TransformerDecoder` takes it.

        Returns:
            As tgt.
        """
        causal = _is_causal(tgt_mask, tgt_is_causal, tgt, self.layers[0].self_attn.batch_first)
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            causal,
            memory_is_causal,
        )


class Transformer(DropIn, nn.Transformer):
    """Drop-in for `torch.nn.Transformer`.

    Args:
        window: of the self-attention in encoder and decoder.
        backend, num_kv_heads: of all attention, as `fastattn.nn.MultiheadAttention` takes them.
        The rest is torch's; the three above do not change a custom encoder or decoder.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        window: Window = None,
        backend: str | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        made: dict[str, Any] = {
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "batch_first": batch_first,
            "norm_first": norm_first,
            "bias": bias,
            "window": window,
            "backend": backend,
            "num_kv_heads": num_kv_heads,
            **place,
        }
        # In torch's order, which a seed's numbers depend on.
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(d_model, nhead, **made)
            norm = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **place)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm)
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(d_model, nhead, **made)
            norm = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **place)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm)
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip


def extended(
    module: nn.MultiheadAttention, window: Window, backend: str | None, num_kv_heads: int | None
) -> MultiheadAttention:
    """Torch's attention module, as its layer made it, as one of ours: the same parameters but for fewer key heads."""
    if num_kv_heads is None:
        module.__class__ = MultiheadAttention
        module._extend(window, backend)  # type: ignore[operator]
        return module  # type: ignore[return-value]
    return MultiheadAttention(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout,
        bias=module.in_proj_bias is not None,
        batch_first=module.batch_first,
        device=module.out_proj.weight.device,
        dtype=module.out_proj.weight.dtype,
        window=window,
        backend=backend,
        num_kv_heads=num_kv_heads,
    )


def _one_kind(
    mask: Tensor | None, name: str, padding: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The masks, both bool or both floating, with torch's errors and its warning about a mixture."""
    for one, called in ((padding, "src_key_padding_mask"), (mask, name)):
        if one is not None and one.dtype != torch.bool and not one.is_floating_point():
            raise AssertionError(f"only bool and floating types of {called} are supported")
    if mask is None or padding is None or mask.dtype == padding.dtype:
        return mask, padding
    warnings.warn(
        f"Support for mismatched src_key_padding_mask and {name} is deprecated. Use same type for both instead.",
        stacklevel=3,
    )
    return _floating(mask, dtype), _floating(padding, dtype)


def _floating(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _is_causal(mask: Tensor | None, hint: bool | None, tokens: Tensor, batch_first: bool) -> bool:
    """The hint, or whether the mask is the causal one, where its values can be read: a causal mask need not be."""
    if hint is not None or mask is None:
        return bool(hint)
    if mask.is_meta or torch.jit.is_tracing() or tracing.being_transformed():
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    length = tokens.shape[0 if tokens.dim() == 2 or not batch_first else 1]
    if tuple(mask.shape) != (length, length):
        return False
    causal = nn.Transformer.generate_square_subsequent_mask(length, device=mask.device, dtype=mask.dtype)
    return bool((mask == causal).all())
