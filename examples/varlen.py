"""Sequences of different lengths laid end to end: no padding."""

import torch

import fastattn
from fastattn.masks import Causal

lengths = torch.tensor([3, 7, 5])
starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
query, key, value = (torch.randn(15, heads, 16) for heads in (4, 2, 2))  # [all tokens, heads, head_dim]

out = fastattn.varlen_attention(query, key, value, starts, mask=Causal())
alone = fastattn.varlen_attention(query[3:10], key[3:10], value[3:10], torch.tensor([0, 7]), mask=Causal())
torch.testing.assert_close(out[3:10], alone)
