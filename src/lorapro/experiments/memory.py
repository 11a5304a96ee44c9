"""Bytes: peak memory of a phase, and tensors inside an optimizer's state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["peak_memory", "reset_peak_memory", "tensor_bytes"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Start a new phase (on CUDA, and on Linux for the process's resident memory)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        try:
            _CLEAR.write_text("5")  # resets VmHWM, see proc(5)
        except OSError:
            return  # a read-only /proc: the peak is then the process's


def peak_memory() -> int | None:
    """Peak bytes since the last reset: CUDA's allocator, else resident memory of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if not _STATUS.exists():
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
    return int(found.group(1)) * 1024 if found else None


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers.

    >>> tensor_bytes({"moments": [torch.zeros(4), torch.zeros(2)], "step": 3})
    24
    """
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(item) for item in value)
    return 0
