"""Running the launches of a call. What they need is made once for all calls of one structure whose tensors lie alike:
the plan, the compiled kernels, every parameter that is no address. A call then brings its addresses.

Triton's own way to a launch looks at each argument to find the kernel that fits, and encodes each descriptor; here the
key says the same in fewer words: the spec's structure, how many blocks there are of keys in blocks, and of each tensor
its dtype, its strides and whether 16 divides its address.
"""

import functools
import operator
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from triton import knobs

from fastattn.kernels.host.kernel_variant import precision_of
from fastattn.kernels.host.launch import (
    INTERPRETED,
    Backward,
    Launch,
    LaunchPlan,
    backward_tensors,
    forward_tensors,
    plan_backward,
    plan_forward,
)
from fastattn.kernels.host.packed_launch import PackedLaunch, pack
from fastattn.kernels.host.tensor_arguments import TMA_BYTES
from fastattn.spec import AttnInputs, AttnSpec

MOST_PLANS = 1024
_PLANS: dict[tuple[Any, ...], "ReadyPlan"] = {}
_STRUCTURES: WeakKeyDictionary[AttnSpec, tuple[Any, ...]] = WeakKeyDictionary()  # plain calls meet their spec again
_THREAD = threading.local()
OWN = frozenset(("lse", "total", "delta", "dq", "dk", "dv", "dbias", "dsinks"))
"""Tensors that lie as the others and the structure say."""


class ReadyLaunch:
    """A planned launch that packs its parameters when it is met again: with a cache that grows by a token, many a plan
    serves one call alone.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.packed: PackedLaunch | None = None
        self.packable = True
        self.compiled: Any = None
        """The kernel, until it is packed."""

    def run(self, spec: AttnSpec, tensors: dict[str, Tensor], addresses: dict[str, int], stream: int | None) -> None:
        """Launches it on the current device: packed where there is a stream to launch on, else by Triton."""
        launch = self.launch
        if launch.lists is not None:
            lists = launch.block_lists(spec)
            tensors = tensors | lists
            addresses = addresses | _addresses(lists)
        if stream is not None:
            if self.compiled is not None:
                self.packed = pack(self.compiled, launch.programs, launch.args, launch.bound(tensors).args)
                self.compiled, self.packable = None, self.packed is not None
            if self.packed is not None:
                self.packed.run(addresses, stream)
                return
        compiled = launch.bound(tensors).run()
        if self.packable and self.packed is None:
            self.compiled = compiled
        _THREAD.launched = True


class ReadyPlan:
    """The launches of a pass."""

    def __init__(self, plan: LaunchPlan) -> None:
        self.plan, self.launches = plan, [ReadyLaunch(each) for each in plan.launches if each.programs]

    def run(self, spec: AttnSpec, tensors: dict[str, Tensor], addresses: dict[str, int]) -> None:
        if self.plan.splits > 1 or self.plan.reads_mask:
            more = self.plan.more_tensors(spec, tensors)
            tensors, addresses = tensors | more, addresses | _addresses(more)
        stream = _stream(spec.device)
        for each in self.launches:
            each.run(spec, tensors, addresses, stream)


def forward(spec: AttnSpec, inputs: AttnInputs, out: Tensor, lse: Tensor, target: str) -> None:
    """Writes out and lse."""
    _run(plan_forward, spec, forward_tensors(spec, inputs, out, lse), target)


def backward(spec: AttnSpec, inputs: AttnInputs, tensors: Backward, target: str) -> None:
    """Writes the gradients."""
    _run(plan_backward, spec, backward_tensors(spec, inputs, tensors), target)


def _run(plan: Callable[..., LaunchPlan], spec: AttnSpec, tensors: dict[str, Tensor], target: str) -> None:
    addresses = _addresses(tensors)
    structure = _STRUCTURES.get(spec) or _structure(spec)
    if structure is None:  # a user's mask, which may be anything
        ReadyPlan(plan(spec, tensors, target)).run(spec, tensors, addresses)
        return
    key: list[Any] = [plan, structure, target, precision_of(spec), "dbias" in tensors]
    if spec.pages is not None:
        key.append(tensors["key"].shape[0])  # how many blocks the pools have
    if functools.reduce(operator.or_, addresses.values()) % TMA_BYTES:  # rare: which ones, then
        key += (address % TMA_BYTES == 0 for address in addresses.values())
    for name, tensor in tensors.items():  # all other shapes follow from the structure
        if name not in OWN:
            key += name, tensor.dtype, tensor.stride()
    found = _PLANS.get(tuple(key))
    if found is None:
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.clear()
        found = _PLANS[tuple(key)] = ReadyPlan(plan(spec, tensors, target))
    found.run(spec, tensors, addresses)


def _structure(spec: AttnSpec) -> tuple[Any, ...] | None:
    """All of a spec but what its mask's tensors hold, by value: calls of one structure whose tensors lie alike are
    launched alike. None where the mask is a class of the user's.
    """
    mask = spec.mask_structure()
    if mask is None:
        return None
    _STRUCTURES[spec] = made = (
        spec.batch, spec.num_heads, spec.num_kv_heads, spec.q_len, spec.kv_len, spec.head_dim, spec.head_dim_v,
        spec.dtype, spec.device, mask, spec.scale, spec.softcap, spec.bias_shape, spec.has_sinks, spec.dropout_p,
        type(spec.score), type(spec.normalizer),
    )  # fmt: skip
    return made


def _addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _stream(device: torch.device) -> int | None:
    """The stream to launch on; None where Triton has to launch: in its interpreter, where somebody hooks its launches,
    and until a thread has launched by Triton, whose launcher gives a thread a CUDA context that has none yet.
    """
    runtime = knobs.runtime
    if INTERPRETED or _hooked(runtime.launch_enter_hook) or _hooked(runtime.launch_exit_hook):
        return None
    if not hasattr(_THREAD, "launched"):
        return None
    return torch._C._cuda_getCurrentRawStream(device.index or 0)


def _hooked(hook: Any) -> bool:
    return bool(getattr(hook, "calls", hook))
