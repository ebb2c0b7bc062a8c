"""Attention that was published outside of the libraries compared with: modules written after the papers' own code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AttentionPool", "HeadsFastest"]


class AttentionPool(nn.Module):
    """The pool of CLIP's ResNets (Radford et al. 2021): their mean queries all positions."""

    def __init__(self, positions: int, embed_dim: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(positions + 1, embed_dim) / embed_dim**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        self.c_proj = nn.Linear(embed_dim, out_dim)
        self.num_heads = num_heads

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, channels, height, width] -> [batch, out_dim]."""
        x = features.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positions[:, None].to(x.dtype)
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        out, _ = nn.functional.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=self.num_heads,
            in_proj_weight=None, in_proj_bias=bias, bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True,
            training=self.training, need_weights=False, q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return out.squeeze(0)


class HeadsFastest(nn.Module):
    """SuperGlue's attention as first published (Sarlin et al. 2020): channel c belongs to head c % num_heads."""

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj = nn.ModuleList([nn.Conv1d(dim, dim, 1) for _ in range(3)])
        self.merge = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """x [batch, dim, n], source [batch, dim, m] -> [batch, dim, n]; then the same of itself."""
        for other in (source, None):
            query, key, value = (
                project(each).unflatten(1, (-1, self.num_heads)).permute(0, 2, 3, 1)
                for project, each in zip(self.proj, (x, *[x if other is None else other] * 2), strict=True)
            )
            out = nn.functional.scaled_dot_product_attention(query, key, value)
            x = x + self.merge(out.permute(0, 3, 1, 2).flatten(1, 2))
        return x
