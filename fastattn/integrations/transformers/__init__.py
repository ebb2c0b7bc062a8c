"""fastattn in Hugging Face transformers. Importing this package registers "fastattn" as an attention implementation."""

from fastattn.integrations.transformers.attention import (
    NAME,
    TESTED,
    attention_forward,
    attention_mask,
    register,
    replace,
    truncate,
)
from fastattn.stable_names import export

__all__ = ["NAME", "TESTED", "attention_forward", "attention_mask", "register", "replace", "truncate"]

export(globals())
