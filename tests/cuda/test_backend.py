"""The CUDA backend's adapter: where it stands on machines with and without a GPU, nvcc or a Hopper chip."""

import dataclasses
import functools
import operator
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastattn import BackendUnavailable, attention, dispatch, explain, process
from fastattn.backends import cuda, triton
from fastattn.building import commands, compiler, cuda_library, nvcc
from fastattn.building.cuda_library import LIBRARY
from fastattn.masks import Causal, Chunked, Dense, Full, Lengths, Segments, Window
from fastattn.masks.paged import Paged
from fastattn.spec import AttnInputs, AttnSpec

TENSOR = torch.empty(1, 2, 16, 64, dtype=torch.bfloat16)


def spec_of(tensor=TENSOR, device=None, **arguments):
    """A spec whose tensors pretend to be on a device."""
    spec = AttnSpec.of(AttnInputs(tensor, tensor, tensor), **arguments)
    return spec if device is None else dataclasses.replace(spec, device=torch.device(device))


def on_gpu(head_dim=64, dtype=torch.bfloat16):
    """A tensor that wants a gradient, on a GPU that is not there."""
    with FakeTensorMode():
        return torch.empty(1, 2, 8, head_dim, dtype=dtype, device="cuda:0", requires_grad=True)


@pytest.fixture
def hopper(chip, monkeypatch):
    """A Hopper GPU as far as both of its backends can see; nothing may be built."""
    chip(9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(
        shared_memory_per_block_optin=227 * 1024))  # fmt: skip
    monkeypatch.setattr(triton, "_interpreting", lambda: False)
    monkeypatch.setattr(triton, "_missing", lambda interpreting: None)
    monkeypatch.delitem(sys.modules, "fastattn.kernels.host.launch", raising=False)
    for name in ("get", "build", "prepare"):
        monkeypatch.setattr(LIBRARY, name, lambda name=name: pytest.fail(f"{name} was called"))
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
    triton._capability.cache_clear()
    yield
    triton._capability.cache_clear()


@pytest.fixture
def chip(monkeypatch):
    """A GPU of a compute capability, as far as the backend can see, and a library that could be built."""

    def put(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        cuda._device_reason.cache_clear()

    monkeypatch.setattr(LIBRARY, "why_not", lambda: None)
    yield put
    cuda._device_reason.cache_clear()


def test_on_a_machine_without_a_gpu_the_backend_says_so():
    reasons = explain(TENSOR, TENSOR, TENSOR).reasons
    assert list(reasons)[:2] == ["cpu", "cuda"]
    assert reasons["cuda"] == "the tensors are on cpu, and this backend runs on NVIDIA GPUs"
    with pytest.raises(BackendUnavailable, match="backend 'cuda' cannot run this call: the tensors are on cpu"):
        attention(TENSOR, TENSOR, TENSOR, backend="cuda")


def test_meta_tensors_are_explained():
    tensor = TENSOR.to("meta")
    assert "the tensors are on meta" in explain(tensor, tensor, tensor).reasons["cuda"]


def test_a_hopper_chip_is_taken_first(chip):
    chip(9, 0)
    assert cuda.why_not(spec_of(device="cuda:0")) is None
    assert dispatch.BACKENDS.index("cuda") < dispatch.BACKENDS.index("triton")


def test_no_gpu_and_another_makers_are_said(monkeypatch, chip):
    chip(9, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in cuda.why_not(spec_of(device="cuda:0"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda._device_reason.cache_clear()
    assert cuda.why_not(spec_of(device="cuda:0")) == "torch sees no NVIDIA GPU here"


def test_training_on_hopper_is_explained_as_the_two_that_run_it(hopper):
    tensor = on_gpu()
    verdict = explain(tensor, tensor, tensor, mask=Causal())
    assert (verdict.backend, verdict.backward) == ("cuda", "triton")
    assert verdict.kernel == "attention forward for Hopper (intervals of keys), attn_delta, attn_dq, attn_dkv"
    assert (verdict.reasons["cuda"], verdict.reasons["triton"]) == (None, None)
    none = "its backward does not exist yet"
    assert (verdict.backward_reasons["cuda"], verdict.backward_reasons["triton"]) == (none, None)
    lines = str(verdict).splitlines()
    assert lines[2] == f"cuda       runs the forward: attention forward for Hopper (intervals of keys); {none}"
    assert lines[3] == "triton     runs the backward: attn_delta, attn_dq, attn_dkv"
    with torch.no_grad():
        verdict = explain(tensor, tensor, tensor)
    assert (verdict.backend, verdict.backward) == ("cuda", None)


def test_asked_for_by_name_it_trains_nobody(hopper):
    tensor = on_gpu()
    says = r"backward does not exist yet\. backend=None runs this very forward with 'triton' as backward; under torch"
    with pytest.raises(BackendUnavailable, match=says):
        explain(tensor, tensor, tensor, backend="cuda")
    with torch.no_grad():
        assert explain(tensor, tensor, tensor, backend="cuda").backend == "cuda"


def test_without_triton_the_reference_is_its_backward(hopper, monkeypatch):
    monkeypatch.setattr(triton, "_missing", lambda interpreting: "the package triton is not installed")
    tensor = on_gpu()
    verdict = explain(tensor, tensor, tensor)
    assert (verdict.backend, verdict.backward) == ("cuda", "reference")
    assert verdict.backward_reasons["triton"] == "the package triton is not installed"


def test_without_its_library_triton_trains_alone(hopper, monkeypatch):
    monkeypatch.setattr(LIBRARY, "why_not", lambda: "no nvcc is found")
    tensor = on_gpu()
    verdict = explain(tensor, tensor, tensor)
    assert (verdict.backend, verdict.backward, verdict.reasons["cuda"]) == ("triton", "triton", "no nvcc is found")


def test_little_shared_memory_takes_wide_float32_gradients_from_triton(hopper, monkeypatch):
    tensor = on_gpu(head_dim=320, dtype=torch.float32)
    assert explain(tensor, tensor, tensor).backward == "triton"
    small = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    verdict = explain(tensor, tensor, tensor)
    assert (verdict.backend, verdict.backward) == ("triton", "reference")
    assert "need 163 KiB of shared memory a block, the device has 99" in verdict.backward_reasons["triton"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)], ids=str)
def test_another_chip_is_none_of_its(chip, capability):
    chip(*capability)
    reason = cuda.why_not(spec_of(device="cuda:0"))
    assert f"capability {capability[0]}.{capability[1]}" in reason and "9.0 (Hopper)" in reason


def test_keys_in_blocks_are_its_own_too(chip):
    chip(9, 0)
    for size in (3, 16):
        inputs = AttnInputs(TENSOR, *(torch.zeros(5, 2, size, 64, dtype=torch.bfloat16),) * 2)
        mask = Paged(Lengths(torch.tensor([9])), torch.zeros(1, 6, dtype=torch.int32), size)
        spec = dataclasses.replace(AttnSpec.of(inputs, mask=mask), device=torch.device("cuda:0"))
        assert dispatch.free_reason("cuda", spec) is None
        assert any("keys lie in blocks of 3" in note for note in cuda.notes(spec, inputs)) == (size == 3)


COPIED = {
    "as-it-is": (lambda tensor: tensor, False),
    "heads-last": (lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2), False),
    "columns-first": (lambda tensor: tensor.mT.contiguous().mT, True),
    "off-by-one": (lambda tensor: torch.cat([tensor[..., :1], tensor], -1)[..., 1:], True),
}


@pytest.mark.parametrize("name", COPIED)
def test_what_is_copied_is_said_of_the_tensors_at_hand(name):
    strides, copied = COPIED[name]
    inputs = AttnInputs(TENSOR, strides(TENSOR), TENSOR)
    said = [note for note in cuda.notes(AttnSpec.of(inputs), inputs) if "copies" in note]
    assert len(said) == copied and all("the whole key first" in note for note in said)
    assert all(str(list(inputs.key.stride())) in note for note in said)


MANY = Dense(torch.ones(16, 16, dtype=torch.bool))
for _ in range(cuda.MOST_TERMS):
    MANY = MANY & Dense(torch.ones(16, 16, dtype=torch.bool))
REFUSED = {
    "float32": (spec_of(TENSOR.float()), "torch.float32 has no kernel; float16 and bfloat16 have"),
    "wide": (spec_of(TENSOR.repeat(1, 1, 1, 5)), "head_dim 320 is above 256"),
    "masks": (spec_of(mask=MANY), "made of 9 masks, at most 8 can be joined"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_it_says(chip, name):
    chip(9, 0)
    spec, words = REFUSED[name]
    assert words in cuda.why_not(dataclasses.replace(spec, device=torch.device("cuda:0")))


@pytest.fixture
def nothing_built(tmp_path, monkeypatch):
    """A cache folder of one's own, and nothing that this process has loaded or found out."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTATTN_BUILD", raising=False)
    monkeypatch.setattr(process, "kept", lambda name: None)
    for name, value in {"loaded": None, "failure": None, "unusable": {}, "damaged": {}}.items():
        monkeypatch.setattr(LIBRARY, name, value)


def test_without_nvcc_the_reason_names_it(nothing_built, monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvcc.shutil, "which", lambda name, path=None: None)
    nvcc._find_nvcc.cache_clear()
    try:
        assert "no nvcc is found" in LIBRARY.why_not()
        assert "no nvcc is found" in cuda_library.state()
        with pytest.raises(compiler.BuildError, match="no nvcc is found"):
            LIBRARY.build()
    finally:
        nvcc._find_nvcc.cache_clear()


@pytest.fixture
def fake(nothing_built, tmp_path, monkeypatch):
    """An nvcc that writes what it is told to; `fake("11.8")` is another version."""

    def put(version, script="exit 0"):
        tool = tmp_path / "bin" / "nvcc"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && echo 'release {version}, V' && exit 0\n{script}\n")
        tool.chmod(0o755)
        nvcc._find_nvcc.cache_clear()

    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    yield put
    nvcc._find_nvcc.cache_clear()


WRITES = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done'


def test_the_library_is_built_once_and_named_by_its_key(fake):
    fake("13.0", WRITES)
    path = LIBRARY.build()
    assert path.exists() and path.name.startswith("fastattn_cuda_") and LIBRARY.build() == path
    assert LIBRARY.find() == path
    fake("13.1", WRITES)
    assert LIBRARY.find() is None


def test_the_library_is_found_without_nvcc_unless_another_toolkit_is_named(fake, monkeypatch, tmp_path):
    fake("13.0", WRITES)
    path = LIBRARY.build()
    nvcc._find_nvcc.cache_clear()
    monkeypatch.setattr(commands, "call", None)  # nothing is asked
    assert LIBRARY.find() == path
    monkeypatch.setattr(nvcc.shutil, "which", lambda name, path=None: None)
    assert LIBRARY.find() == path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "another"))
    assert LIBRARY.find() is None


@pytest.mark.parametrize("harm", ["cut off", "all can write to it", "a link"])
def test_a_library_that_is_damaged_or_anybodys_is_not_taken(fake, harm):
    fake("13.0", WRITES)
    path = LIBRARY.build()
    assert LIBRARY.find() == path
    if harm == "cut off":
        path.write_text("mad")
    elif harm == "a link":
        path.rename(path.with_suffix(".moved"))
        path.symlink_to(path.with_suffix(".moved"))
    else:
        path.chmod(0o666)
    assert LIBRARY.find() is None
    (said,) = [*LIBRARY.damaged, *LIBRARY.unusable]
    assert {"cut off": "has 3 bytes", "a link": "is a link"}.get(harm, "can be written by others") in said


def test_a_failed_build_is_remembered_and_repeated(fake):
    fake("13.0", 'echo "forward.cu(1): error: no such thing" >&2; exit 1')
    with pytest.raises(compiler.BuildError, match="no such thing"):
        LIBRARY.build()
    assert "no such thing" in LIBRARY.why_not()
    assert "no such thing" in LIBRARY.prepare()


def test_an_old_nvcc_is_refused(fake):
    fake("11.8")
    assert "nvcc 11.8 is too old" in LIBRARY.why_not()


def test_a_build_that_is_forbidden_is_not_started(fake, monkeypatch):
    fake("13.0")
    monkeypatch.setenv("FASTATTN_BUILD", "never")
    assert "FASTATTN_BUILD=never forbids it" in LIBRARY.why_not()


def test_the_backends_do_not_share_a_key():
    """Nobody's CPU library is built again for a change of a CUDA kernel."""
    assert compiler.source_digest("cpu") != compiler.source_digest("cuda")
    root = compiler.sources()
    assert any(path.suffix == ".cu" for path in (root / "cuda").iterdir())
    assert compiler.made_for("cpu", []) != compiler.made_for("cuda", [])


def test_widths_are_those_of_the_tile_table():
    text = (compiler.sources() / "cuda" / "tiles.h").read_text()
    table = text[text.index("kWidths[][2] =") :].split(";")[0].split("=")[1]
    assert eval(table.replace("{", "(").replace("}", ")")) == nvcc.WIDTHS


VARIANTS = {
    "plain": (None, cuda.PLAIN, False),
    "full": (Full(), cuda.PLAIN, False),
    "causal": (Causal(), cuda.MASKED, False),
    "top-left": (Causal(align="top-left", offset=-1), cuda.MASKED, True),
    "window": (Window(3, 0), cuda.MASKED, False),
    "both": (Window(3, 0) & Causal(), cuda.MASKED, False),
    "lengths": (Lengths(torch.tensor([9])), cuda.MASKED, True),
    "chunked": (Chunked(4), cuda.MASKED, True),
    "two-intervals": (Window(3, 0) | Lengths(torch.tensor([2])), cuda.MASKED, True),
    "table": (Dense(torch.ones(16, 16, dtype=torch.bool)), cuda.GENERAL, True),
    "scattered": (Segments(torch.arange(16)[None] % 3), cuda.GENERAL, True),
    "sorted": (Segments(torch.arange(16)[None] // 5, sorted=True), cuda.MASKED, True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_mask_gets_the_leanest_kernel_that_can(name):
    mask, variant, hides = VARIANTS[name]
    launch = cuda._launch(spec_of(mask=mask))
    assert (launch.variant, launch.hides) == (variant, hides)
    assert cuda.kernel_name(spec_of(mask=mask)).endswith(f"({cuda.VARIANTS[variant]})")


def test_more_intervals_than_a_kernel_takes_are_refused_before_a_run():
    query = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16)
    for terms, refused in ((8, False), (9, True)):
        mask = functools.reduce(operator.or_, [Window(0, 0, offset=5 * n) for n in range(terms)])
        spec = AttnSpec.of(AttnInputs(query, query, query), mask=mask)
        reason = cuda.feature_reason(spec)
        assert (reason is not None) == refused, terms
