"""A BlockMask written for FlexAttention as fastattn's mask."""

import torch
from torch.nn.attention.flex_attention import and_masks, create_block_mask

import fastattn

document = torch.arange(256)[None] // 100
causal = lambda b, h, q, kv: q >= kv
same = lambda b, h, q, kv: document[b, q] == document[b, kv]
mask = create_block_mask(and_masks(causal, same), None, None, 256, 256, device="cpu")

query, key, value = (torch.randn(1, heads, 256, 16) for heads in (4, 2, 2))
print(fastattn.attention(query, key, value, mask=mask).shape)
