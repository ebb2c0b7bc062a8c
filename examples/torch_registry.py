"""fastattn behind torch's own scaled_dot_product_attention, in every library, by torch's own registry."""

import torch
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from fastattn.integrations.torch import registry

query = key = value = torch.randn(2, 4, 10, 16)
want = F.scaled_dot_product_attention(query, key, value, is_causal=True)

activate_flash_attention_impl(registry.register())
torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, is_causal=True), want)
restore_flash_attention_impl()
