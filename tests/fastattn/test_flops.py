"""FLOP formulas of the operators, in torch's counter."""

import subprocess
import sys

import pytest

FLOPS = """
import importlib.util, sys, torch
{first}
import fastattn
importlib.util.find_spec("torch.utils.flop_counter")  # asking is not importing
assert ({loaded} or "torch.utils.flop_counter" not in sys.modules)
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(2, 4, 8, 16, requires_grad=True); k = torch.randn(2, 2, 10, 16)
with FlopCounterMode(display=False) as counter:
    fastattn.attention(q, k, k, backend="reference").sum().backward()
counts = {{str(op): n for op, n in counter.get_flop_counts()["Global"].items()}}
assert counts["fastattn.attention_forward"] == 4 * 2 * 4 * 8 * 10 * 16, counts
assert counts["fastattn.attention_backward"] == 10 * 2 * 4 * 8 * 10 * 16, counts
"""


@pytest.mark.parametrize("first", ["", "import torch.utils.flop_counter"], ids=["counter-after", "counter-before"])
def test_flop_formulas_are_registered_whichever_is_imported_first(first):
    code = FLOPS.format(first=first, loaded=bool(first))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
