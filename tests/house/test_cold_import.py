"""`import fastattn` in a fresh process: light, without a GPU, and without what it does not need."""

import json
import subprocess
import sys

import pytest

IMPORT = """
import sys, time, json
import torch
before = set(sys.modules)
start = time.perf_counter()
import fastattn
seconds = time.perf_counter() - start
new = sorted(set(sys.modules) - before)
print(json.dumps({"new": new, "seconds": seconds, "cuda": torch.cuda.is_initialized()}))
"""

CALL = """
import sys
sys.modules.update(dict.fromkeys(["triton", "numpy", "rich", "matplotlib", "transformers"]))  # blocked
import torch, fastattn
query = torch.randn(1, 2, 5, 8, requires_grad=True)
fastattn.attention(query, query, query, mask=fastattn.masks.Window(2, 0)).sum().backward()
fastattn.nn.MultiheadAttention(8, 2)(torch.randn(3, 1, 8), torch.randn(4, 1, 8), torch.randn(4, 1, 8))
print(fastattn.explain(query, query, query))
"""

REPLACE = """
import sys
import torch, fastattn
assert len(fastattn.replace_attention(torch.nn.TransformerEncoderLayer(8, 2))) == 1
libraries = ("diffusers", "flash_attn", "transformers", "vision", "x_transformers")
print(*(name for name in sys.modules if name.startswith(tuple(f"fastattn.integrations.{each}" for each in libraries))))
"""


def fresh(code, cwd):
    """Standard output of the code in a new process, away from the checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    return json.loads(fresh(IMPORT, tmp_path_factory.mktemp("elsewhere")))


def test_import_adds_nothing_but_fastattn_and_the_standard_library(cold, record_property):
    record_property("import_seconds_beyond_torch", cold["seconds"])
    roots = {name.split(".")[0] for name in cold["new"]}
    assert roots - set(sys.stdlib_module_names) - {"torch"} == {"fastattn"}


def test_import_leaves_out_the_backends_the_benchmark_and_the_flop_counter(cold):
    heavy = ("fastattn.kernels", "fastattn.bench", "fastattn.testing", "torch.utils.flop_counter", "torch._dynamo")
    assert [name for name in cold["new"] if name.startswith(heavy)] == []


@pytest.mark.parametrize("library", ["diffusers", "flash_attn", "transformers", "vision", "x_transformers"])
def test_import_loads_no_integration_of_a_library(cold, library):
    """Each is loaded by its own import, or by replace_attention of a model that holds modules of that library."""
    name = f"fastattn.integrations.{library}"
    assert [each for each in cold["new"] if each == name or each.startswith(f"{name}.")] == []


def test_replacing_torchs_attention_loads_no_integration_of_a_library(tmp_path):
    loaded = fresh(REPLACE, tmp_path).split()
    assert loaded == []


def test_import_takes_no_gpu_memory(cold):
    assert not cold["cuda"]


def test_everything_but_triton_works_where_torch_is_alone(tmp_path):
    assert "reference" in fresh(CALL, tmp_path)
