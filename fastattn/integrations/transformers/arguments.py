"""What single families of transformers pass to their attention beside what all do: done here, or refused by name."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.integrations.sdpa_redirect import names_in
from fastattn.masks import Dense, Mask, Segments

__all__ = ["absorbed", "check", "is_causal", "packed", "sinks_of"]

NOT_DONE = frozenset({"indices", "block_indices", "head_mask"})
"""Arguments that change the attention and that have no place in `fastattn.attention`."""

_OWN: dict[type, frozenset[str]] = {}
_CAUSAL: dict[type, tuple[bool, bool]] = {}


def check(module: nn.Module, arguments: dict[str, Any], known: frozenset[str]) -> None:
    """Nothing that changes the attention is passed by in silence.

    An argument does if the eager attention beside the module's class takes it by name; what only travels through models
    (`use_cache`, `num_items_in_batch`) eager attention does not name.

    Args:
        arguments: what came besides, by name.
        known: names that are done.

    Raises:
        ValueError: there is one that is not done.
    """
    wrong = (NOT_DONE | own_names(type(module))) - known
    for name, value in arguments.items():
        if value is not None and name in wrong:
            raise ValueError(
                f"{type(module).__name__} passes {name}=, which changes its attention and is not done by fastattn; "
                "model.set_attn_implementation('eager') runs it"
            )


def own_names(kind: type) -> frozenset[str]:
    """The arguments that the eager attention in a class's own file takes by name."""
    if kind not in _OWN:
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        parameters = inspect.signature(eager).parameters.values() if callable(eager) else ()
        _OWN[kind] = frozenset(each.name for each in parameters if each.kind is not each.VAR_KEYWORD)
    return _OWN[kind]


def is_causal(module: nn.Module, given: bool | None) -> bool:
    """What a module says of a causal mask that torch's SDPA would leave to it: False takes the mask away.

    Somebody makes a decoder an encoder so: by the module's `is_causal`, or by the model's argument of that name. False
    says nothing of the mask where the module was made with it and the model asks for a causal mask all the same: where
    the class says so always (Aimv2), the configuration does (PaliGemma), or the model cannot run on SDPA (PegasusX).
    Neither does an argument that the module's own code computed (Moonshine's: "causal, and there is no mask").

    Args:
        given: `is_causal` as the attention got it.
    """
    reads, born_false = _causal_words(type(module))
    causal = getattr(module, "is_causal", True) if given is None or reads else given
    if causal or born_false:
        return True
    return bool(getattr(getattr(module, "config", None), "use_bidirectional_attention", False))


def _causal_words(kind: type) -> tuple[bool, bool]:
    """Whether a class's forward reads `is_causal`; and whether False in it is how the class was written."""
    if kind not in _CAUSAL:
        forward = getattr(kind, "forward", None)
        reads = callable(forward) and "is_causal" in names_in(inspect.unwrap(forward))
        beside = vars(sys.modules[kind.__module__]).values() if kind.__module__ in sys.modules else ()
        supports = [
            each._supports_sdpa for each in beside if isinstance(each, type) and hasattr(each, "_supports_sdpa")
        ]
        _CAUSAL[kind] = reads, _always_false(kind) or (bool(supports) and not any(supports))
    return _CAUSAL[kind]


def _always_false(kind: Any) -> bool:
    """Whether a class's own __init__ sets `is_causal` to False whatever it is given."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.__init__)))
    except (OSError, TypeError, SyntaxError):
        return False
    set_to = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and any(getattr(each, "attr", None) == "is_causal" for each in node.targets)
    ]
    return bool(set_to) and all(isinstance(each, ast.Constant) and each.value is False for each in set_to)


# Compilers take the answers for constants, and need not look into inspect.
own_names._dynamo_marked_constant = True  # type: ignore[attr-defined]
_causal_words._dynamo_marked_constant = True  # type: ignore[attr-defined]


def packed(mask: Mask | Tensor | None, query: Tensor, key: Tensor, arguments: dict[str, Any]) -> Mask | Tensor | None:
    """The mask, and nobody sees another sequence, where cu_seq_lens_q and cu_seq_lens_k say where sequences begin.

    query [batch, heads, q_len, dim] and key [batch, heads, kv_len, dim] are sequences laid end to end, row after row.
    """
    cu_q, cu_kv = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
    if not isinstance(cu_q, Tensor) or not isinstance(cu_kv, Tensor):
        return mask
    q_ids, kv_ids = (
        torch.searchsorted(
            cu[1:].to(query.device, torch.int64),
            torch.arange(query.shape[0] * length, device=query.device),
            right=True,
        ).view(query.shape[0], length)
        for cu, length in ((cu_q, query.shape[2]), (cu_kv, key.shape[2]))
    )
    apart = Segments(q_ids, kv_ids, sorted=True, validate=False)
    if mask is None:
        return apart
    return (Dense(mask) if isinstance(mask, Tensor) else mask) & apart


def sinks_of(module: nn.Module, query: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """A logit of its own for each query, [batch, num_heads, q_len, 1], that only takes weight away (Inkling 2).

    Raises:
        ValueError: another shape.
    """
    sinks = arguments.get("sinks")
    if sinks is None:
        return None
    want = [*query.shape[:3], 1]
    if not isinstance(sinks, Tensor) or list(sinks.shape) != want:
        got = list(sinks.shape) if isinstance(sinks, Tensor) else type(sinks).__name__
        raise ValueError(f"{type(module).__name__}: sinks= [batch, num_heads, q_len, 1] = {want} is needed, got {got}")
    return sinks


def absorbed(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """out or weights [batch, num_heads, q_len, ...] without the share that each query's sink takes."""
    share = torch.sigmoid(lse[..., None] - sinks.to(lse.dtype))
    return (out * share).to(out.dtype)
