"""Run one of PyTorch's own test files with fastattn's classes and functions in the place of torch's.

    python tests/torch_suite.py PATH_TO/test_transformers.py [--plain] [pytest arguments]

PyTorch's tests are not part of this repository; use a checkout near the installed torch. `--plain` leaves torch as it
is, for a run to compare with. Tests that are expected to differ are marked xfail with the reason; docs/torch.md has the
results.
"""

from __future__ import annotations

import sys
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
import torch.nn.modules.activation
import torch.nn.modules.transformer

import fastattn.nn
from fastattn.mha import multi_head_attention_forward
from fastattn.sdpa import scaled_dot_product_attention

NAN_ROWS = "a query that sees no key gives 0 where torch gives NaN"
FAST_PATH = "mocks torch's C++ fast path and demands that it is taken; fastattn never takes it"
EXPECTED = {
    "test_multihead_attention_average_attn_weights_*": NAN_ROWS,
    "test_multihead_self_attn_two_masks_fast_path_mock*": FAST_PATH,
}
"""Pattern of a test's name -> why fastattn answers differently."""


def put_in_place() -> None:
    """What a user who replaces by assignment would have to assign."""
    for module in (torch.nn, torch.nn.modules, torch.nn.modules.activation, torch.nn.modules.transformer):
        module.MultiheadAttention = fastattn.nn.MultiheadAttention
    F.scaled_dot_product_attention = scaled_dot_product_attention
    F.multi_head_attention_forward = multi_head_attention_forward


class Expected:
    """Marks what is known to differ."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for pattern, reason in EXPECTED.items():
                if fnmatch(item.name, pattern):
                    item.add_marker(pytest.mark.xfail(reason=reason))


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    plain = "--plain" in arguments
    arguments = [argument for argument in arguments if argument != "--plain"]
    if not plain:
        put_in_place()
    own = ["-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore"]
    return int(pytest.main([*own, *arguments], plugins=[] if plain else [Expected()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
