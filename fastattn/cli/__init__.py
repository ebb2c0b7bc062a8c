"""The command line: `fastattn`, and `python -m fastattn.cli`."""

from fastattn.cli.main import main

__all__ = ["main"]
