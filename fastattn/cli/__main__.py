"""`python -m fastattn.cli` is `fastattn`."""

import sys

from fastattn.cli.main import main

sys.exit(main())
