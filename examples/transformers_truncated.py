"""A speech encoder that attends everywhere, made to look at its neighbours alone; and the exact weights to show it."""

import torch
import transformers

from fastattn.integrations.transformers import truncate

heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
config = transformers.WhisperConfig(d_model=32, encoder_layers=1, num_mel_bins=16, max_source_positions=40, **heads)
encoder = transformers.WhisperModel(config).encoder.eval()
encoder.set_attn_implementation("fastattn")
undo = truncate(encoder, left=3, right=1)
weights = encoder(torch.randn(1, 16, 80), output_attentions=True).attentions[0]
print("frame 20 sees frames", weights[0, 0, 20].nonzero().flatten().tolist())
undo()
