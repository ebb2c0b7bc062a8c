"""A transformers model on fastattn: one import and one name. Grouped heads and padding stay what they are."""

import torch
import transformers

from fastattn.integrations.transformers import NAME  # "fastattn": importing registers it

sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, pad_token_id=0, **sizes)
model = transformers.LlamaForCausalLM(config).eval()
ids, real = torch.randint(3, 99, (2, 12)), torch.ones(2, 12, dtype=torch.long)
real[0, :5] = 0  # left padding
found = {}
for name in ("eager", NAME):
    model.set_attn_implementation(name)
    found[name] = model.generate(ids, attention_mask=real, max_new_tokens=5, do_sample=False)
print(found[NAME][:, 12:], "the same as eager's:", torch.equal(found["eager"], found[NAME]))
