"""fastattn in diffusers."""

from fastattn.integrations.diffusers.replacement import attention, register

__all__ = ["attention", "register"]
