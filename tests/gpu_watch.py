"""What tests on a GPU are watched for: a kernel that never ends, and one that spoils the CUDA context, after which
every later test of the process would fail. Either ends the process, which names the test; pytest-xdist then starts
another. `make gpu` watches every test so by itself (bench/gpu/pytest_lines.py), and this then only lets it.
"""

import contextlib
import faulthandler
import os
import sys

import pytest

FAILED = 3
"""The exit code of a process whose CUDA context is spoilt."""


@contextlib.contextmanager
def watched(node, synchronize, within):
    """Around one test of at most `within` seconds; `synchronize` raises a RuntimeError where the context is spoilt."""
    if node.config.pluginmanager.hasplugin("fastattn.bench.gpu.pytest_lines"):
        yield
        return
    capture = node.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        outside = os.dup(sys.__stderr__.fileno())
    faulthandler.dump_traceback_later(within, exit=True, file=outside)
    try:
        yield
        synchronize()
    except RuntimeError as error:
        words = f"{node.nodeid} has left a CUDA context that no later test can use: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" in os.environ:
            os.write(outside, f"\n{words}\n".encode())
            os._exit(FAILED)
        pytest.exit(words, returncode=FAILED)
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.close(outside)
