"""For the tests of the Triton backend: its masks (every class with a rule in every form, users' own, combinations), and
an interpreter that does not do its work twice.
"""

import importlib.util
import inspect
import os
from dataclasses import dataclass

import pytest
import torch

from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Packed, Prefix, Segments, Window
from fastattn.masks.base import Mask
from fastattn.spec import AttnInputs, AttnSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ints(*values):
    return torch.tensor(values, device=DEVICE)


def some(n):
    return ints(n // 2, n)


@dataclass(frozen=True, eq=False)
class Strided(Mask):
    """A user's mask: an interval a query that neither grows nor shrinks steadily; a third of them see nothing."""

    def interval(self, q_idx, q_len, kv_len):
        start = q_idx * 7 % kv_len
        return start, start + q_idx % 3 * 9


@dataclass(frozen=True, eq=False)
class HeadWindows(Mask):
    """A user's mask: a window for each head."""

    left: torch.Tensor

    def interval(self, q_idx, q_len, kv_len):
        stop = (q_idx + 1 + kv_len - q_len).expand(1, len(self.left), -1)
        return stop - self.left[:, None], stop


@dataclass(frozen=True, eq=False)
class FirstKeys(Mask):
    """A user's mask whose interval has no dimensions at all."""

    def interval(self, q_idx, q_len, kv_len):
        return torch.zeros((), dtype=torch.int64, device=DEVICE), torch.tensor(20, device=DEVICE)


def documents(*lengths, device=DEVICE):
    """Ids that count documents of these lengths; the rest is padding."""

    def ids(n):
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
        found = torch.searchsorted(bounds, torch.arange(n, device=device), right=True) - 1
        return torch.where(found >= len(lengths), -1, found)[None]

    return ids


def scattered(n, seed, batch=2):
    return torch.randint(-1, 3, (batch, n), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def table(*shape):
    return Dense((torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape))) < 0.4).to(DEVICE))


def blocky(batch, heads, q_len, kv_len):
    """Whole tiles shown, whole tiles hidden, some in between."""
    full = torch.ones(batch, heads, q_len, kv_len, dtype=torch.bool)
    full[:, :, : q_len // 2, kv_len // 3 :] = False
    full[:1, :1, :, :20] = False
    full[..., -1:] = False
    return Dense(full.to(DEVICE))


def packed(q_len, kv_len, inside, *, cut=3, rest=0):
    """A third, nothing, the rest but for some tokens that belong to nobody."""
    cu = [torch.tensor([0, n // cut, n // cut, max(n - rest, n // cut)], device=DEVICE) for n in (q_len, kv_len)]
    return Packed(*cu, inside)


def placed_masks(q_len, kv_len):
    """Causal, Window and Prefix wherever they are put."""
    return {
        "causal": Causal(),
        "causal-top-left": Causal(align="top-left"),
        "causal-offset": Causal(offset=-3),
        "causal-far": Causal(offset=2**40),
        "causal-nobody": Causal(offset=-(2**40)),
        "causal-offsets": Causal(offset=ints(7, -50)),
        "causal-offset-shared": Causal(offset=ints(4).int()),
        "window": Window(5, 2),
        "window-0": Window(0, 0),
        "window-17": Window(17, 0, align="top-left"),
        "window-40": Window(40, 40),
        "window-open-left": Window(None, 3),
        "window-open-right": Window(3, None),
        "window-open": Window(None, None),
        "window-far": Window(2**35, 3),
        "window-outside": Window(1, 1, offset=500),
        "window-offsets": Window(9, 1, offset=ints(20, -4)),
        "window-offsets-far": Window(None, 2, offset=ints(2**63 - 1, -(2**63))),
        "prefix": Prefix(some(kv_len)),
        "prefix-top-left": Prefix(some(kv_len // 2).int(), align="top-left"),
        "prefix-offset": Prefix(ints(9), offset=-20),
        "prefix-offsets": Prefix(ints(0, 1000), offset=ints(-30, 11)),
    }


def closed_masks(q_len, kv_len):
    """The other rules in closed form, and row tables."""
    q_ids, kv_ids = (documents(11, 6, 0, 17)(n) for n in (q_len, kv_len))
    return {
        "full": Full(),
        "chunked": Chunked(7),
        "chunked-1": Chunked(1, 2, 1),
        "chunked-back": Chunked(5, 1, 0),
        "chunked-16": Chunked(16, 1, 1, align="top-left"),
        "chunked-open-left": Chunked(5, None, 0),
        "chunked-open-right": Chunked(5, 1, None),
        "chunked-open": Chunked(5, None, None),
        "chunked-negative": Chunked(6, 1, 0, offset=-13),
        "chunked-offsets": Chunked(6, 0, 1, offset=ints(11, -40)),
        "chunked-offsets-far": Chunked(6, None, 1, offset=ints(2**62, -(2**62))),
        "chunked-wide": Chunked(2**40, 2**50, 0),
        "chunked-wide-negative": Chunked(2**62, offset=-1),
        "chunked-wide-far": Chunked(2**40, offset=2**35),
        "lengths": Lengths(some(kv_len)),
        "lengths-32": Lengths(some(kv_len).int()),
        "lengths-0": Lengths(ints(0, 1)),
        "lengths-beyond": Lengths(ints(1000, 3)),
        "lengths-all": Lengths(some(kv_len), q_lengths=some(q_len), kv_starts=ints(2, kv_len // 3)),
        "lengths-start-past-stop": Lengths(ints(9, kv_len), kv_starts=ints(30, 1000)),
        "lengths-shared": Lengths(ints(kv_len // 2)),
        "segments-sorted": Segments(q_ids, kv_ids, sorted=True),
        "segments-sorted-two": Segments(torch.cat([q_ids, q_ids * 0]), torch.cat([kv_ids // 2, kv_ids]), sorted=True),
        "segments-sorted-nobody": Segments(q_ids * 0 - 1, kv_ids, sorted=True),
        "user": Strided(),
        "user-heads": HeadWindows(ints(3, 30)),
        "user-no-dims": FirstKeys(),
    }


def packed_masks(q_len, kv_len):
    """Batch 1."""
    return {
        "packed-full": packed(q_len, kv_len, Full()),
        "packed-causal": packed(q_len, kv_len, Causal(), rest=5),
        "packed-top-left": packed(q_len, kv_len, Causal(align="top-left"), cut=2),
        "packed-window": packed(q_len, kv_len, Window(3, 1)),
        "packed-chunked": packed(q_len, kv_len, Chunked(4, 1)),
        "packed-both": packed(q_len, kv_len, Causal() & Window(9, 4), cut=4, rest=3),
        "packed-none": Packed(ints(0), ints(0)),
        "packed-keys-elsewhere": Packed(ints(0, q_len // 2, q_len), ints(0, 0, kv_len)),
        "packed-and": packed(q_len, kv_len, Full()) & Window(12, 3),
        "packed-or": packed(q_len, kv_len, Causal()) | Lengths(ints(4)),
    }


def listed_masks(q_len, kv_len):
    """What has no interval."""
    q_ids, kv_ids = scattered(q_len, 1), scattered(kv_len, 2)
    return {
        "segments": Segments(q_ids, kv_ids),
        "segments-shared": Segments(q_ids[:1].int(), kv_ids.int()),
        "segments-blocks": Segments(documents(9, 20, 9)(q_len), documents(9, 20, 9)(kv_len)),
        "dense": table(q_len, kv_len),
        "dense-keys": table(1, kv_len),
        "dense-queries": table(q_len, 1),
        "dense-one": table(1, 1),
        "dense-batch": table(2, 1, q_len, kv_len),
        "dense-heads": table(1, 2, q_len, kv_len),
        "dense-all": table(2, 2, q_len, kv_len),
        "dense-batch-keys": table(2, 1, 1, kv_len),
        "dense-transposed": Dense(table(kv_len, q_len).table.mT),
        "dense-blocks": blocky(1, 1, q_len, kv_len),
        "dense-blocks-all": blocky(2, 2, q_len, kv_len),
    }


def combined_masks(q_len, kv_len):
    """Trees: one AND, two terms, more than two, with rules that have no span."""
    near, far, padding = Window(6, 2), Causal(offset=-20), Lengths(some(kv_len), q_lengths=some(q_len))
    return {
        "and": Causal(offset=ints(3, 9)) & Window(11, 4) & Lengths(some(kv_len), kv_starts=ints(1, 0)),
        "and-all": Causal(offset=5) & Window(30, None) & Chunked(16, 1) & padding & Prefix(ints(3)),
        "and-user": Strided() & Causal() & padding,
        "or": near | Lengths(ints(4, 0)),
        "or-before": Lengths(ints(0, 9)) | near,
        "or-overlap": Window(9, 9) | Window(2, 20, offset=3),
        "or-apart": Window(2, 2, offset=-25) | Window(2, 2, offset=25),
        "or-empty": Window(1, 1, offset=500) | far,
        "or-user": Strided() | near,
        "or-of-ands": (far & Lengths(ints(40, 7))) | (near & padding),
        "and-of-or": (near | far) & padding & Window(40, None),
        "or-three": near | far | Lengths(ints(4, 0)),
        "and-of-ors": (near | far) & (Lengths(ints(4, 0)) | Chunked(16)),
        "or-dense": table(q_len, kv_len) | near,
        "and-dense": blocky(2, 2, q_len, kv_len) & Causal() & padding,
        "and-segments": Segments(documents(9, 20, 9)(q_len), documents(9, 20, 9)(kv_len)) & Causal(),
        "or-everything": table(2, 1, q_len, kv_len) & near | Segments(scattered(q_len, 1), scattered(kv_len, 2)) | far,
        "full-and": Full() & near,
        "full-or": near | (Full() & Full()),
        "full-inside": (Full() & near) | (far & Full()),
    }  # fmt: skip


MAKERS = (placed_masks, closed_masks, packed_masks, listed_masks, combined_masks)
ZOO = {name: make for make in MAKERS for name in make(4, 4)}


def spec_of(name, q_len, kv_len):
    """A problem of these lengths with a mask of the zoo."""
    batch, heads = 1 if "packed" in name else 2, 2 if "dense" in name or "heads" in name else 1
    query, key = (torch.empty(batch, heads, length, 16, device=DEVICE) for length in (q_len, kv_len))
    return AttnSpec.of(AttnInputs(query, key, key), mask=ZOO[name](q_len, kv_len)[name])


@pytest.fixture(name="spec_of")
def spec_of_name():
    return spec_of


@pytest.fixture(params=ZOO)
def name(request):
    """Every mask of the zoo in turn."""
    return request.param


@pytest.fixture
def zoo():
    """All their names."""
    return tuple(ZOO)


@pytest.fixture(scope="session", autouse=True)
def patch_the_language_once():
    """Triton's interpreter patches its language at each call of a device function, though the kernel's launch has
    done so already: nearly half of its time.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patched = set()
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_once(function):
        modules = {id(each) for each in function.__globals__.values() if inspect.ismodule(each)}
        langs = modules & {id(interpreter.tl), id(interpreter.tl.core)}
        if langs <= patched:
            return None
        patched.update(langs)
        return patch_lang(function)

    def launch_anew(*arguments, **options):
        patched.clear()
        return launch(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


@pytest.fixture(scope="session")
def stub(tmp_path_factory):
    """Triton's launcher against a stand-in for libcuda (stub/driver.py), in processes that test_launcher.py starts."""
    from driver import Stub

    from fastattn.kernels.host.launch import INTERPRETED

    assert not INTERPRETED, "the launcher is Triton's own: set TRITON_INTERPRET=0"
    return Stub(tmp_path_factory.mktemp("libcuda"))
