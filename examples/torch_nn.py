"""torch.nn's Transformer on fastattn: the same constructor, state_dict and numbers, and a window on top."""

import torch

from fastattn import nn

model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), num_layers=2).eval()
torchs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), num_layers=2)
model.load_state_dict(torchs.state_dict())

tokens = torch.randn(2, 10, 64)
torch.testing.assert_close(model(tokens), torchs.eval()(tokens))

windowed = nn.TransformerEncoderLayer(64, 4, batch_first=True, window=(3, 0), num_kv_heads=2)
print(windowed(tokens).shape)
