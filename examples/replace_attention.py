"""Attention modules exchanged in place, what was done told module by module, and everything put back."""

import torch

import fastattn

model = torch.nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()
source, target = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
want = model(source, target)

report = fastattn.replace_attention(model)
print(report)
torch.testing.assert_close(model(source, target), want)
report.restore()
