"""fastattn in diffusers."""

from fastattn.integrations.diffusers.dispatcher import NAME, attention, register
from fastattn.stable_names import export

__all__ = ["NAME", "attention", "register"]

export(globals())
