"""Masks as the C++ backends read them, put together again here and held against `dense`."""

import pytest
import torch

from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Packed, Segments, Window, program
from fastattn.masks.base import Mask
from fastattn.testing import CASES
from fastattn.testing.nan_padding import PADDED

SIZES = [(0, 5), (5, 0), (1, 1), (8, 50), (70, 64)]


class HeadWindows(Mask):
    """A user's mask: a window for each head."""

    __dataclass_fields__ = {}  # noqa: RUF012

    def interval(self, q_idx, q_len, kv_len):
        reach = torch.arange(3)[None, :, None]
        return q_idx - reach, q_idx + reach


MASKS = {name: make for name, make in PADDED.items() if not name.startswith("table")} | {
    "full": lambda q, kv: Full(),
    "causal": lambda q, kv: Causal(),
    "far": lambda q, kv: Window(2**62, 0, offset=2**62) & Causal(offset=-(2**62)),
    "chunks-of-any-size": lambda q, kv: Chunked(2**62, None, 0),
    "and-of-ors": lambda q, kv: (Window(1, 1) | Causal(offset=-9)) & (Lengths(torch.tensor([9])) | Window(3, 3)),
    "scattered-or-window": lambda q, kv: (
        Segments(torch.arange(q)[None] % 3, torch.arange(kv)[None] % 3) & Causal() | Window(2, 0)
    ),
    "of-a-user": lambda q, kv: HeadWindows(),
    "of-a-user-and": lambda q, kv: HeadWindows() & Dense(torch.rand(q, kv) < 0.5),
    "row": lambda q, kv: Dense(torch.rand(kv) < 0.5),
    "packed-none": lambda q, kv: Packed(torch.tensor([0]), torch.tensor([0])),
}


def table(found, q_len, kv_len):
    """The program run over bool tables."""
    keys = torch.arange(kv_len)
    tensors, stack = iter(found.tensors), []
    for word in found.words:
        if word == program.INTERVAL:
            ends = next(tensors)
            assert ends.dtype == torch.int32 and ends.dim() == 4 and ends.shape[0] == 2
            assert ((ends >= 0) & (ends <= kv_len)).all()
            start, stop = ends[..., None]
            stack.append((keys >= start) & (keys < stop))
        elif word == program.ELEMENTS:
            elements = next(tensors)
            assert elements.dtype == torch.bool and elements.dim() <= 4
            stack.append(elements)
        elif word == program.IDS:
            q_ids, kv_ids = next(tensors)[:, None, :, None], next(tensors)[:, None, None]
            assert q_ids.dtype == kv_ids.dtype == torch.int64
            stack.append((q_ids == kv_ids) & (q_ids >= 0))
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(left & right if word == program.AND else left | right)
    assert next(tensors, None) is None
    return stack.pop() if stack else torch.ones((), dtype=torch.bool)


@pytest.mark.parametrize(
    "name, q_len, kv_len", [(name, *size) for name in MASKS for size in SIZES if size[0] >= 8 or name not in PADDED]
)
def test_a_mask_program_shows_what_the_mask_shows(name, q_len, kv_len):
    mask = MASKS[name](q_len, kv_len)
    assert program.why_not(mask) is None
    shape = 2, 3, q_len, kv_len
    for _ in range(2):  # made, and kept
        got = table(program.make_program(mask, q_len, kv_len), q_len, kv_len)
        assert torch.equal(got.expand(shape), mask.dense(q_len, kv_len).expand(shape))


def test_intervals_stay_intervals_however_they_are_put_together():
    lengths = Lengths(torch.tensor([5, 3]))
    for mask, words in (
        (Full(), []),
        (Causal() & Window(3, 0) & lengths, [program.INTERVAL]),
        ((Window(3, 0) | lengths) & Chunked(4), [program.INTERVAL, program.INTERVAL, program.OR]),
        (Causal() & Dense(torch.ones(6, 6, dtype=torch.bool)), [program.INTERVAL, program.ELEMENTS, program.AND]),
        (Segments(torch.zeros(1, 6, dtype=torch.int32), sorted=True), [program.INTERVAL]),
        (Segments(torch.zeros(1, 6, dtype=torch.int32)), [program.IDS]),
    ):
        assert program.make_program(mask, 6, 6).words == words


def test_a_mask_of_equal_numbers_is_made_once_and_one_with_tensors_each_time():
    first, again = (program.make_program(Window(3, 1), 40, 50) for _ in range(2))
    assert first.tensors[0] is again.tensors[0]
    assert program.make_program(Window(3, 2), 40, 50).tensors[0] is not first.tensors[0]
    lengths = Lengths(torch.tensor([4]))
    before = program.make_program(lengths, 4, 9).tensors[0].clone()
    lengths.kv_lengths.add_(1)
    assert torch.equal(program.make_program(lengths, 4, 9).tensors[0][1], before[1] + 1)


def test_every_row_has_a_mask_program():
    from fastattn.testing import make_inputs

    assert {name: program.why_not(make_inputs(case).spec.mask) for name, case in CASES.items()} == dict.fromkeys(CASES)


def test_what_inference_mode_made_serves_training_after_it():
    from fastattn import attention

    query = torch.randn(1, 2, 23, 16)
    with torch.inference_mode():
        want = attention(query, query, query, mask=Window(5, 5))
    leaf = query.clone().requires_grad_()
    out = attention(leaf, leaf, leaf, mask=Window(5, 5))
    out.sum().backward()
    assert torch.equal(out, want)


def test_a_users_mask_that_changes_is_read_anew():
    from fastattn import attention

    class Reach(Mask):
        """A mask that can be changed."""

        __dataclass_fields__ = {}  # noqa: RUF012
        __hash__ = None

        def __init__(self, reach):
            self.reach = reach

        def interval(self, q_idx, q_len, kv_len):
            return q_idx - self.reach, q_idx + 1

    query, mask = torch.randn(1, 1, 9, 8), Reach(2)
    for reach in (2, 4):
        mask.reach = reach
        got = attention(query, query, query, mask=mask)
        torch.testing.assert_close(got, attention(query, query, query, mask=Window(reach, 0)))
