"""Data-parallel training under torchrun; one process behaves as if none of this were here."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Ranks(NamedTuple):
    """This process among all of them."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0


def start(device: str) -> Ranks:
    """Joins the other ranks if torchrun started this process: gloo on the CPU, NCCL on CUDA."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(0, 1, torch.device(device))
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), world, place)


def wrap(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model whose backward pass averages gradients over the ranks."""
    if ranks.world == 1:
        return model
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)


def total(values: list[float], ranks: Ranks) -> list[float]:
    """Sums over the ranks."""
    if ranks.world == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def stop() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
