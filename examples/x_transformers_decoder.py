"""A decoder of x-transformers that calls torch's SDPA (`attn_flash=True`), on fastattn."""

import torch
from x_transformers import Decoder, TransformerWrapper

import fastattn

layers = Decoder(dim=64, depth=2, heads=4, attn_flash=True, rotary_pos_emb=True, attn_kv_heads=2)
model = TransformerWrapper(num_tokens=100, max_seq_len=64, attn_layers=layers).eval()
tokens = torch.randint(100, (2, 20))
before = model(tokens)

print(fastattn.replace_attention(model))
torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
