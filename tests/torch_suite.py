"""Run one of PyTorch's own test files with fastattn's classes and functions in the place of torch's.

    python tests/torch_suite.py PATH_TO/test_transformers.py [--plain] [pytest arguments]

PyTorch's tests are not part of this repository; use a checkout near the installed torch. `--plain` leaves torch as it
is, for a run to compare with. Tests that are expected to differ are marked xfail with the reason; docs/torch.md has the
results.
"""

import sys
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
import torch.nn.modules.activation
import torch.nn.modules.transformer
from torch import Tensor

import fastattn.nn
from fastattn.torch_api import sdpa
from fastattn.torch_api.mha import TORCH_MHA, multi_head_attention_forward

NAN_ROWS = "a query that sees no key gives 0 where torch gives NaN"
FAST_PATH = "mocks torch's C++ fast path and demands that it is taken; fastattn never takes it"
DROPOUT = "expects the weights that torch's generator would drop, bit for bit; fastattn's dropout has bits of its own"
EXPECTED = {
    "test_multihead_attention_average_attn_weights_*": NAN_ROWS,
    "test_multihead_self_attn_two_masks_fast_path_mock*": FAST_PATH,
    "test_disable_fastpath*": FAST_PATH,
    "test_mask_check_fastpath*": FAST_PATH,
    "test_scaled_dot_product_attention_*_dropout_p_0_[25]*": DROPOUT,
    "test_transformerencoderlayer_subclass_*": DROPOUT,
}
"""Pattern of a test's name -> why fastattn answers differently."""


def put_in_place() -> None:
    """What a user who replaces by assignment would have to assign."""
    for module in (torch.nn, torch.nn.modules, torch.nn.modules.activation, torch.nn.modules.transformer):
        module.MultiheadAttention = fastattn.nn.MultiheadAttention
    for ours, torchs in (
        (sdpa.scaled_dot_product_attention, scaled_dot_product_attention),
        (multi_head_attention_forward, TORCH_MHA),
    ):
        # TorchScript compiles the source of what it finds under a name; as for a swapped module, it gets torch's.
        ours.__script_if_tracing_wrapper = True
        ours.__original_fn = torchs
    F.scaled_dot_product_attention = sdpa.scaled_dot_product_attention
    F.multi_head_attention_forward = multi_head_attention_forward


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's own for TorchScript, which insists on the name."""
    return torch._C._nn.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


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
