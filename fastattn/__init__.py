"""fastattn: every kind of attention as one fused call, behind the API of torch.nn."""

from importlib.util import find_spec as _find_spec

if _find_spec("fastattn.kernels") is None:
    raise ImportError(
        "fastattn is imported from a checkout that is not installed, so its kernels cannot be found; "
        "run `make setup` or `pip install --no-build-isolation -e .` there, or leave this folder"
    )

from fastattn import masks, nn, stable_names
from fastattn.cache import KVCache
from fastattn.dispatch import BackendUnavailable, Verdict
from fastattn.functional import attention, attention_weights, dropout_mask, explain
from fastattn.integrations.torch import patch, replace_attention
from fastattn.torch_api.mha import multi_head_attention_forward
from fastattn.torch_api.sdpa import scaled_dot_product_attention
from fastattn.varlen import varlen_attention

stable_names.install()

__version__ = "0.1.0"
__all__ = [
    "attention", "attention_weights", "dropout_mask", "explain", "varlen_attention",
    "KVCache", "masks", "nn", "BackendUnavailable", "Verdict",
    "scaled_dot_product_attention", "multi_head_attention_forward", "replace_attention", "patch",
]  # fmt: skip
