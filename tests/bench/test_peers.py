"""Other libraries by import, played by modules that compute with PyTorch: layouts, masks, and what each does not do."""

import os
import sys

import pytest
import torch

from fastattn.bench.cases.operations import bench_cases
from fastattn.bench.cases.workload import Workload
from fastattn.bench.measure.providers import peers
from fastattn.bench.measure.providers.peers import PEERS
from fastattn.cli import main

# Their masks, by their own conventions: bottom-right, both ends of a window included, -1 or None without an end.
ATTEND = """
import torch

CALLS = []

def attend(query, key, value, left, right):
    CALLS.append((tuple(query.shape), query.is_contiguous()))
    assert query.is_contiguous(), "heads after length, in memory too"
    query, key, value = (each.transpose(1, 2).double() for each in (query, key, value))
    rows = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    columns = torch.arange(key.shape[2])
    seen = (left is None) | (columns >= rows - (left or 0))
    seen = seen & ((right is None) | (columns <= rows + (right or 0)))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2)
"""
FLASH = """
from attend_by_hand import attend

def flash_attn_func(q, k, v, causal=False, window_size=({none}, {none})):
    left, right = (None if each == {none} else each for each in window_size)
    out = attend(q, k, v, left, 0 if causal else right).to(q.dtype)
    return {result}
"""
XFORMERS = """
from types import SimpleNamespace
from attend_by_hand import attend

class LowerTriangularFromBottomRightMask:
    left, right = None, 0

class LocalAttentionFromBottomRightMask:
    def __init__(self, window_left, window_right):
        self.left, self.right = window_left, window_right

fmha = SimpleNamespace(attn_bias=SimpleNamespace(
    LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
    LocalAttentionFromBottomRightMask=LocalAttentionFromBottomRightMask,
))

def memory_efficient_attention(query, key, value, attn_bias=None):
    shape = query.shape
    if query.dim() == 5:
        assert key.shape[3] == query.shape[3] and key.stride(3) == 0, "repeated without a copy"
        key, value = key[:, :, :, 0], value[:, :, :, 0]
        query = query.flatten(2, 3)
    bias = attn_bias or LocalAttentionFromBottomRightMask(None, None)
    return attend(query, key, value, bias.left, bias.right).to(query.dtype).view(shape)
"""
FILES = {
    "flash_attn/__init__.py": FLASH.format(none=-1, result="out"),
    "flash_attn/cute/__init__.py": FLASH.format(none=None, result="out, None"),
    "flash_attn_interface.py": FLASH.format(none=-1, result="out, None"),
    "fa3_fwd_interface.py": FLASH.format(none=-1, result="out"),
    "xformers/__init__.py": "",
    "xformers/ops.py": XFORMERS,
}


def forget():
    for name in [name for name in sys.modules if name.split(".")[0] in ROOTS]:
        del sys.modules[name]


ROOTS = {path.split("/")[0].removesuffix(".py") for path in FILES} | {"attend_by_hand"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of peers, and peers that would run on a CPU."""
    wheels = tmp_path / "wheels"
    for name, text in {**FILES, "attend_by_hand.py": ATTEND}.items():
        (wheels / name).parent.mkdir(parents=True, exist_ok=True)
        (wheels / name).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(peers.FOLDER, str(wheels))
    monkeypatch.setattr(peers.Peer, "devices", ("cpu",))
    forget()
    yield wheels
    forget()


def workload(op, cpu, dtype="bf16", **sizes):
    [case] = bench_cases(
        "cpu", ops=[op], dtypes=[dtype], **{"q_len": [24], "num_heads": [4], "head_dim": [16], **sizes}
    )
    return Workload(case, cpu)


@pytest.mark.parametrize("op", ["self", "causal", "truncated", "cross", "gqa", "decode"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_gets_each_mask_by_its_own_convention(folder, cpu, name, op):
    made_of = workload(op, cpu)
    mode = "fwd" if name == "xformers" and op == "gqa" else "fwd+bwd"
    assert PEERS[name].why_not(made_of, mode) is None
    made = PEERS[name].make(made_of, mode)
    verdict = made_of.check(made_of.results(mode, made))
    assert verdict.ok, verdict.worst
    calls = sys.modules["attend_by_hand"].CALLS
    heads = made_of.case.num_heads
    assert all(shape[-2] == heads for shape, _ in calls if len(shape) == 4)


def test_tensors_are_laid_out_once_and_outside_the_call(folder, cpu, monkeypatch):
    made_of = workload("causal", cpu)
    call = made_of.call("fwd", PEERS["fa2"].make(made_of, "fwd"))
    call()
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: 1 / 0)
    call()


@pytest.mark.parametrize(
    "name, op, mode, more, reason",
    [
        ("fa2", "self", "fwd", {"dtype": "fp32"}, "no fp32"),
        ("fa2", "masked", "fwd", {}, "no Lengths mask"),
        ("fa4", "self", "fwd", {"head_dim": [320]}, "no head dim 320"),
        ("fa4", "self", "fwd", {"head_dim": [20]}, "no head dim 20"),
        ("xformers", "gqa", "bwd", {}, "no backward with shared key heads"),
        ("fa3", "self", "bwd", {"without": "flash_attn_interface.py"}, "no backward in fa3_fwd_interface"),
        ("fa3", "truncated", "fwd", {"without": "flash_attn_interface.py"}, "no window in fa3_fwd_interface"),
    ],
)
def test_what_a_peer_does_not_do_is_its_reason(folder, cpu, name, op, mode, more, reason):
    if "without" in more:
        (folder / more["without"]).unlink()
    sizes = {key: value for key, value in more.items() if key != "without"}
    assert PEERS[name].why_not(workload(op, cpu, **sizes), mode) == reason


def test_a_peer_that_is_not_there_or_lacks_a_part_says_so(folder, cpu):
    made_of = workload("self", cpu)
    (folder / "xformers/ops.py").write_text("import a_part_of_it")
    (folder / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    (folder / "fa3_fwd_interface.py").unlink()
    assert peers.found() == ["fa2", "fa4"]
    assert PEERS["xformers"].why_not(made_of, "fwd") == "xformers.ops needs a_part_of_it, which is not installed"
    assert PEERS["fa3"].why_not(made_of, "fwd") == "flash_attn_interface: OSError: libcudart.so.13: cannot open"
    (folder / "flash_attn_interface.py").unlink()
    assert PEERS["fa3"].why_not(made_of, "fwd") == "no module flash_attn_interface or fa3_fwd_interface"


def test_the_folder_comes_last_on_the_path(folder):
    peers.found()
    assert sys.path[-1] == str(folder)


def test_peers_need_a_gpu(cpu):
    assert {peer.why_not(workload("self", cpu), "fwd") for peer in PEERS.values()} == {"needs CUDA"}


def test_the_folder_is_an_option_and_must_exist(folder, bench, capsys, monkeypatch):
    monkeypatch.delenv(peers.FOLDER)
    flags = ("--op", "self", "--mode", "fwd", "--dtype", "bf16", "--providers", "fa2,sdpa", "--peers")
    code, _, report = bench(*flags, str(folder))
    assert code == 0 and [row["label"] for row in report["rows"]] == ["flash_attn", ""]
    assert os.environ[peers.FOLDER] == str(folder)
    assert main(["bench", *flags, "nowhere"]) == 2
    assert "peers: nowhere is no folder" in capsys.readouterr().err


def test_a_peer_that_crashes_or_is_wrong_is_a_cell_and_the_run_goes_on(folder, bench):
    (folder / "flash_attn/__init__.py").write_text("def flash_attn_func(q, k, v): raise RuntimeError('sm_90 alone')")
    (folder / "flash_attn_interface.py").write_text("def flash_attn_func(q, k, v): return 1.1 * q")
    flags = ("--op", "self", "--mode", "fwd", "--dtype", "bf16", "--providers", "fa2,fa3,sdpa")
    code, _, report = bench(*flags)
    crashed, wrong, sdpa = report["rows"]
    assert code == 0 and sdpa["samples_ms"] and not crashed["samples_ms"] and not wrong["samples_ms"]
    assert crashed["reason"] == "RuntimeError: sm_90 alone" and wrong["reason"].startswith("wrong: out")


@pytest.mark.parametrize(
    "body, reason",
    [
        ("return q.detach().clone()", "no backward in flash_attn_interface"),
        ("return Forward.apply(q)", "no backward: RuntimeError: this build has no backward pass"),
        ("return Absent.apply(q)", "no backward: NotImplementedError"),
    ],
    ids=["no graph", "built without", "not written"],
)
def test_a_library_without_a_backward_says_so_in_its_cell(folder, bench, body, reason):
    (folder / "flash_attn_interface.py").write_text(
        "import torch\n"
        "class Forward(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, q): return q.clone()\n"
        "    @staticmethod\n    def backward(ctx, d): raise RuntimeError('this build has no backward pass')\n"
        "class Absent(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, q): return q.clone()\n"
        f"def flash_attn_func(q, k, v): {body}\n"
    )
    flags = ("--op", "self", "--mode", "bwd", "--dtype", "bf16", "--providers", "fa3,sdpa")
    code, text, report = bench(*flags)
    absent, _ = report["rows"]
    assert code == 0 and absent["reason"].startswith(reason) and not absent["crashed"] and "no backward" in text.out
