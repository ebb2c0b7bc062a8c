"""fastattn in diffusers."""

from fastattn.former_names import export
from fastattn.integrations.diffusers.replacement import NAME, attention, register

__all__ = ["NAME", "attention", "register"]

export(globals())
