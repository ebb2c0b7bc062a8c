"""A file that cannot be collected, in a dry run."""

import a_module_that_is_not_there  # noqa: F401
