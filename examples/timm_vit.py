"""A vision transformer of timm on fastattn."""

import timm
import torch

import fastattn

model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).eval()
image = torch.randn(1, 3, 32, 32)
want = model(image)

print(fastattn.replace_attention(model))
torch.testing.assert_close(model(image), want, rtol=1e-4, atol=1e-4)
