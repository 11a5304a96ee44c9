"""A checkpoint goes on in more or fewer processes, through torch.distributed.checkpoint."""

from __future__ import annotations

import pytest
import torch

from distributed.curves import of_one_process, resumed, saved
from distributed.spawned import spawned

SIZES = {"rank": 3, "hidden": 16, "wide": 10}


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("full", 2, 1), ("efficient", 1, 2), ("factored", 2, 4)],
)
def test_a_checkpoint_goes_on_in_another_number_of_processes(kind, before, after, tmp_path):
    folders = [tmp_path / name for name in ("first", "second", "checkpoint")]
    for folder in folders:
        folder.mkdir()
    checkpoint = str(folders[2])
    losses = spawned(saved, before, folders[0], kind, checkpoint, SIZES)[0]
    losses += spawned(resumed, after, folders[1], kind, checkpoint, SIZES)[0]
    expected = of_one_process([kind], **SIZES)[kind]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
