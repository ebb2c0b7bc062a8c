"""The smallest call of a backend, in a process of its own: a child of `make gpu`.

    python -m fastattn.bench.gpu.smoke cuda cuda        the backend, the device: {"difference": 0.004, "ok": true}

A kernel that never ends, or a launcher that refuses, is known after a few seconds, before anything waits for it. The
call is made again with other tensors: a backend may launch what it has met before in another way (kernels/host/run.py).
"""

from __future__ import annotations

import json
import math
import sys

from fastattn.bench.gpu.watchdog import Watch

SHAPE = (1, 2, 300, 64)
"""batch, heads, length, head_dim: three tiles, the last one not full."""

CALLS = 3
CLOSE = 2e-2
"""Absolute and relative: both round their weights to bfloat16."""


def main(argv: list[str]) -> int:
    """0 as PyTorch's attention says, 1 another result; what raises, raises."""
    backend, device = argv
    watch = Watch()
    import torch
    import torch.nn.functional as F

    import fastattn

    watch.heard()
    differences, ok, kept = [], True, []
    for _ in range(CALLS):
        query, key, value = (torch.randn(SHAPE, device=device, dtype=torch.bfloat16) for _ in range(3))
        with torch.no_grad():
            out = fastattn.attention(query, key, value, mask=fastattn.masks.Causal(), backend=backend).float()
            want = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
        differences.append((out - want).abs().max().item())
        ok = ok and torch.allclose(out, want, atol=CLOSE, rtol=CLOSE)
        kept.append((query, key, value))  # or the next ones would lie where these did
    difference = math.nan if any(map(math.isnan, differences)) else max(differences)
    print(json.dumps({"difference": difference, "ok": ok}), flush=True)
    watch.stop()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
