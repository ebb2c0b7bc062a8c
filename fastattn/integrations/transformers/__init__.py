"""fastattn in Hugging Face transformers, by one import:

    import fastattn.integrations.transformers
    model.set_attn_implementation("fastattn")      # or from_pretrained(..., attn_implementation="fastattn")

Models whose attention goes through transformers' own interface run on it; `replace` also reaches those that compute
attention in code of their own and are known here. Masks stay what they say (causal, window, chunks, padding): no
[q_len, kv_len] tensor is made of them.
"""

from fastattn.integrations.transformers.attention import (
    NAME,
    TESTED,
    attention_forward,
    attention_mask,
    register,
    replace,
    truncate,
)

__all__ = ["NAME", "TESTED", "attention_forward", "attention_mask", "register", "replace", "truncate"]
