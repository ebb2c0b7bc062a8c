"""CLIP's attention pool, which calls F.multi_head_attention_forward itself, on fastattn."""

import torch
from open_clip.modified_resnet import AttentionPool2d

import fastattn

pool = AttentionPool2d(spacial_dim=4, embed_dim=32, num_heads=4, output_dim=16)
image = torch.randn(2, 32, 4, 4)
want = pool(image)

print(fastattn.replace_attention(pool))
torch.testing.assert_close(pool(image), want, rtol=1e-4, atol=1e-4)
