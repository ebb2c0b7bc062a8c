"""Every variant of the forward kernel with each access to shared memory held against the barriers: no race, nothing
read before it is written, no fence missing between ordinary accesses and those of TMA and wgmma.
"""

import dataclasses

import pytest
import torch

from fastattn.masks import Causal, Dense, Lengths, Window
from fastattn.testing import Case, check_close, make_inputs

SHARED = Case("checked", 150, 300, 1, 4, 2, 64)
CASES = (
    dataclasses.replace(SHARED, id="plain"),
    dataclasses.replace(SHARED, id="masked", mask=lambda *_: Causal() & Window(90, 0)),
    dataclasses.replace(SHARED, id="hides", mask=lambda *_: Lengths(torch.tensor([170]), kv_starts=torch.tensor([9]))),
    dataclasses.replace(SHARED, id="features", bias=(1, 4, 150, 300), softcap=9.0, sinks=True, dropout_p=0.2),
    dataclasses.replace(SHARED, id="lists", mask=lambda *_: Dense(torch.arange(300) % 7 < 4)),
    dataclasses.replace(SHARED, id="packed-heads", q_len=17, mask=lambda *_: Causal()),
    dataclasses.replace(SHARED, id="split", q_len=1, kv_len=900),
)
WIDTHS = {"64": (64, 64), "128": (128, 128), "256": (256, 256)}
"""Three warpgroups that compute, two that take turns, two that do not."""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_access_is_ordered(case, width, checked):
    head_dim, head_dim_v = WIDTHS[width]
    problem = make_inputs(dataclasses.replace(case, head_dim=head_dim, head_dim_v=head_dim_v))
    if case.id == "hides":  # rows that the loading warp clears, which TMA wrote and wgmma reads
        problem.inputs.value[:, :, :9] = torch.nan
        problem.inputs.value[:, :, 170:] = torch.inf
    check_close(problem, checked.forward(problem, seed=3))
