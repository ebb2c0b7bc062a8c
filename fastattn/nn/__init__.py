"""Modules of torch.nn on fastattn."""

from fastattn.nn.attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
