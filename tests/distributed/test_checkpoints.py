"""A checkpoint of two processes goes on in one, through torch.distributed.checkpoint."""

from __future__ import annotations

import pytest
import torch

from distributed.curves import of_one_process, resumed, saved
from distributed.spawned import spawned

SIZES = {"rank": 3, "hidden": 16, "wide": 10}


@pytest.mark.parametrize("kind", ["full", "factored"])
def test_two_processes_save_and_one_goes_on(kind, tmp_path):
    folders = [tmp_path / name for name in ("first", "second", "checkpoint")]
    for folder in folders:
        folder.mkdir()
    checkpoint = str(folders[2])
    losses = spawned(saved, 2, folders[0], kind, checkpoint, SIZES)[0]
    losses += spawned(resumed, 1, folders[1], kind, checkpoint, SIZES)[0]
    expected = of_one_process([kind], **SIZES)[kind]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
