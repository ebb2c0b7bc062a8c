"""A vision transformer of torchvision on fastattn."""

import torch
import torchvision

import fastattn

model = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128).eval()
image = torch.randn(1, 3, 32, 32)
want = model(image)

print(fastattn.replace_attention(model))
torch.testing.assert_close(model(image), want, rtol=1e-4, atol=1e-4)
