"""Several processes at one job, as torchrun starts them: who is who, and what all of them know.

Every process runs the same code over its own share of the questions. Only small objects travel,
whatever the device. Without torchrun there is one process, and all of this costs nothing.

    torchrun --nproc-per-node 2 eval.py --limit 100
"""

import os
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from model import InputError, expect

PATIENCE_S = 5.0  # how long a rank waits for another to make the same mistake
TOLD = "told"  # a key of the store: how many ranks have made a mistake

store = None  # what all ranks can read and write, once they have met


class LostRank(Exception):
    """The connection to another rank broke: it has ended."""


def rank() -> tuple[int, int]:
    """(this process's number, how many there are): (0, 1) unless torchrun started several.

    The first call waits for the others. Raises InputError if the environment is not torchrun's.
    """
    number, world = place()
    if world > 1 and store is None:
        meet()
    return number, world


def place() -> tuple[int, int]:
    """(RANK, WORLD_SIZE) of the environment. Batch systems set WORLD_SIZE alone: one process."""
    if "RANK" not in os.environ:
        return 0, 1
    values = []
    for key in ("RANK", "WORLD_SIZE"):
        text = os.environ.get(key, "")
        wanted = f"{key}: expected a whole number, as torchrun sets it"
        expect(key in os.environ, f"{wanted}, found none beside RANK")
        expect(text.isascii() and text.isdigit(), f"{wanted}, found {text!r}")
        values.append(int(text))
    number, world = values
    expect(number < world, f"RANK: expected a number below WORLD_SIZE {world}, found {number}")
    return number, world


def meet() -> None:
    """Waits for the other ranks where MASTER_ADDR and MASTER_PORT say."""
    global store
    try:
        store, number, world = next(rendezvous("env://"))
        dist.init_process_group("gloo", store=store, rank=number, world_size=world)
    except (ValueError, RuntimeError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise InputError(f"RANK: the processes cannot meet ({reason:.200})") from None


def first_to_tell() -> bool:
    """Whether this rank is the one that tells of its mistake. The first rank goes before the
    others, for most mistakes are made by all. Where the first rank has ended, all has been told."""
    if store is None:
        return True
    try:
        if dist.get_rank() > 0:
            wait_for_told(1)
        return store.add(TOLD, 1) == 1
    except RuntimeError:
        return False


def let_others_hear() -> None:
    """Keeps the first rank, which holds the store, until the others have looked into it."""
    if store is not None and dist.get_rank() == 0:
        wait_for_told(dist.get_world_size())


def wait_for_told(ranks: int) -> None:
    """Waits until so many ranks have made a mistake, for a few seconds at most."""
    deadline = time.monotonic() + PATIENCE_S
    while store.add(TOLD, 0) < ranks and time.monotonic() < deadline:
        time.sleep(0.05)


def gather(value) -> list:
    """The values of all ranks, in their order, on every rank. Raises LostRank if one has ended."""
    world = rank()[1]
    values = [value] * world
    if world > 1:
        try:
            dist.all_gather_object(values, value)
        except RuntimeError:
            raise LostRank from None
    return values


def interleave(mine: list) -> list:
    """The items of all ranks, where rank k has items k, k + world, ..., in their order."""
    shards = gather(mine)
    longest = max(map(len, shards))
    return [shard[i] for i in range(longest) for shard in shards if i < len(shard)]


def timer(seconds: float) -> Callable[[], bool]:
    """Tells whether time is left, by the first rank's clock, so that all ranks do the same."""
    deadline = time.monotonic() + seconds
    return lambda: gather(time.monotonic() < deadline)[0]
