"""The command line: `fastattn`, and `python -m fastattn.cli`."""

from fastattn.cli.main import main
from fastattn.stable_names import export

__all__ = ["main"]

export(globals())
