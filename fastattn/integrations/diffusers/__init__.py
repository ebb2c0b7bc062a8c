"""fastattn as an attention backend of diffusers' dispatcher.

Newer models (Flux, SD3, Wan) send every attention through `dispatch_attention_fn`, whose backends have names:
`register()` adds "fastattn", for `model.set_attention_backend("fastattn")` and `with attention_backend("fastattn")`.
Tested with diffusers 0.42; its registry is marked experimental there.
"""

from fastattn.integrations.diffusers.dispatcher import NAME, attention, register

__all__ = ["NAME", "attention", "register"]
