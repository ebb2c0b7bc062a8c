"""Code that calls torch's attention functions, run on fastattn without being changed."""

import torch
import torch.nn.functional as F

import fastattn

query = key = value = torch.randn(2, 4, 10, 16)
want = F.scaled_dot_product_attention(query, key, value, is_causal=True)

with fastattn.patch():
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
torch.testing.assert_close(out, want)
