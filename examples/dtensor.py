"""Attention on DTensors, each rank its own heads: `torchrun --nproc-per-node=4 examples/dtensor.py`, or one process."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastattn

world = int(os.environ.get("WORLD_SIZE", 1))
if world == 1:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (world,))

torch.manual_seed(0)
query, key, value = (torch.randn(2, heads, 10, 16) for heads in (8, 4, 4))
heads = [distribute_tensor(tensor, mesh, [Shard(1)]) for tensor in (query, key, value)]
out = fastattn.attention(*heads)
torch.testing.assert_close(out.full_tensor(), fastattn.attention(query, key, value))
if dist.get_rank() == 0:
    print(f"each of {world} ranks computed {out.to_local().shape[1]} heads")
dist.destroy_process_group()
