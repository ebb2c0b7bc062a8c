"""`python -m fastattn.bench` is `fastattn bench`."""

import sys

from fastattn.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
