"""A diffusion transformer on fastattn, through diffusers' own dispatcher."""

import torch
from diffusers import FluxTransformer2DModel

import fastattn.integrations.diffusers

small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
model = FluxTransformer2DModel(
    in_channels=4, **small, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)
)
fastattn.integrations.diffusers.register()
model.set_attention_backend("fastattn")  # or: fastattn.replace_attention(model)

noise, text, pooled = torch.randn(1, 16, 4), torch.randn(1, 8, 32), torch.randn(1, 32)
print(model(noise, text, pooled, torch.ones(1), torch.zeros(16, 3), torch.zeros(8, 3)).sample.shape)
model.reset_attention_backend()
