"""fastattn in diffusers."""

from fastattn.integrations.diffusers.dispatcher import NAME, attention, register

__all__ = ["NAME", "attention", "register"]
