"""fastattn: every kind of attention as one fused call, behind the API of torch.nn."""

from importlib.util import find_spec as _find_spec

if _find_spec("fastattn.kernels") is None:
    raise ImportError(
        "fastattn is imported from a checkout that is not installed, so its kernels cannot be found; "
        "run `make setup` or `pip install --no-build-isolation -e .` there, or leave this folder"
    )

from fastattn import masks
from fastattn.dispatch import BackendUnavailable, Verdict
from fastattn.functional import attention, attention_weights, dropout_mask, explain

__version__ = "0.1.0"
__all__ = [
    "attention", "attention_weights", "dropout_mask", "explain", "masks",
    "BackendUnavailable", "Verdict",
]  # fmt: skip
