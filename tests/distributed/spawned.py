"""Runs a function in several processes that talk through gloo on this machine."""

from __future__ import annotations

import collections
import importlib
import os
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode


def _enter(rank, world, folder, function, args):
    torch.set_num_threads(1)
    # What launchers say of a process, for accelerate and DeepSpeed.
    os.environ |= {
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
        "WORLD_SIZE": f"{world}",
        "LOCAL_WORLD_SIZE": f"{world}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # nobody listens: the processes have met by then
    }
    store = f"file://{folder}/store"  # a file: no port to be free
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        if isinstance(function, str):
            module, name = function.split(":")
            function = getattr(importlib.import_module(module), name)
        result = function(rank, world, *args)
    except BaseException:
        result = RuntimeError(traceback.format_exc())
    torch.save(result, f"{folder}/{rank}.pt")
    if isinstance(result, RuntimeError):
        raise SystemExit(1)
    dist.barrier()
    dist.destroy_process_group()


def spawned(function, world, folder, *args):
    """What ``function(rank, world, *args)`` returned in every process.

    A function by name, ``"module:name"``, is imported by the processes only.
    """
    mp.start_processes(_enter, (world, str(folder), function, args), nprocs=world)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def said(call):
    """What a call is refused with; ``None`` if it is not."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


class Wire(TorchDispatchMode):
    """Counts collectives and the bytes that one process puts in."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self.calls[name] += 1
            sent = args[1] if name.startswith("alltoall") else args[0]
            tensors = sent if isinstance(sent, (list, tuple)) else [sent]
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))
