"""What the forward kernel makes of strides in either form: compiled in a process of its own, without the interpreter.

It prints a JSON line for each case: the parameters that are decoded, and those that are not.
"""

import json
import re

import torch

from fastattn.kernels.host import launch
from fastattn.kernels.inspect.compile import GPUS, pretending
from fastattn.masks import Dense, Full
from fastattn.spec import AttnInputs, AttnSpec

BATCH, HEADS, QUERIES, KEYS, DIM = 2, 4, 19, 23, 16


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def odd(*shape):
    """Steps that 16 does not divide."""
    return tensor(*shape[:-1], shape[-1] + 1)[..., :-1]


def every_second(*shape):
    """16 divides the steps, and numbers are 2 apart."""
    return tensor(*shape[:-1], 2 * shape[-1])[..., ::2]


def odd_every_second(*shape):
    return tensor(*shape[:-1], 2 * shape[-1] + 1)[..., :-1:2]


# What lies how, and of how many tensors the kernel reads opaque strides.
CASES = {
    "all as they are": ({}, 0),
    "opaque keys": ({"key": odd}, 1),
    "opaque queries": ({"query": odd}, 1),
    "opaque keys and values": ({"key": odd, "value": odd}, 2),
    "two apart, opaque and not": ({"query": every_second, "key": odd_every_second}, 1),
    "two apart, not opaque and opaque": ({"query": odd_every_second, "key": every_second}, 1),
    "a bias of queries": ({"bias": (QUERIES, 1)}, 1),
    "a bias of heads": ({"bias": (HEADS, 1, 1)}, 1),
    "a bias of batch items": ({"bias": (BATCH, 1, 1, 1)}, 1),
    "a bias of queries and keys": ({"bias": (QUERIES, KEYS)}, 1),
    "a bias, and opaque keys two apart": ({"bias": (HEADS, QUERIES, 1), "key": odd_every_second}, 2),
    "a table": ({"mask": True}, 1),
    "a table and opaque values": ({"mask": True, "value": odd}, 2),
}


NAME = r"%(?:strides|mask_args)\w*"


def read(made):
    """Compiled for sm_80, which moves tiles by pointers: float32, four query heads of a key head."""
    query = made.get("query", tensor)(BATCH, HEADS, QUERIES, DIM)
    key, value = (made.get(name, tensor)(BATCH, 1, KEYS, DIM) for name in ("key", "value"))
    bias = tensor(*made["bias"]) if "bias" in made else None
    inputs = AttnInputs(query, key, value, bias, None, None)
    mask = Dense(tensor(QUERIES, KEYS, dtype=torch.bool)) if "mask" in made else Full()
    spec = AttnSpec.of(inputs, mask=mask)
    first = launch.forward(spec, inputs, tensor(*query.shape), spec.empty_lse(query), "sm80")[0]
    with pretending(GPUS["sm80"]):
        ir = first.kernel.warmup(*first.args, grid=(first.programs,), **first.options).asm["ttir"]
    decoded = set(re.findall(rf"arith\.shrsi ({NAME}),", ir))
    plain = set(re.findall(rf"arith\.(?!shrsi)\w+ .*?({NAME})\b", ir))
    return sorted(decoded), sorted(plain)


if __name__ == "__main__":
    for name, (made, _) in CASES.items():
        print(json.dumps([name, *read(made)]), flush=True)
