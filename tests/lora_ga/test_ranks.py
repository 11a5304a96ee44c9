"""Two processes with a part of the batches each start from the gradient of all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorapro import lora_ga
from lorapro.factors import find_pairs

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"
)

WORKER = """
import json, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from conftest import adapted, llama, text_batches
from lorapro import lora_ga
from lorapro.factors import find_pairs

dist.init_process_group("gloo")
model, batches = adapted(llama()), text_batches()
own = batches[:2] if dist.get_rank() == 0 else batches[2:]
lora_ga.initialize(model, own, estimator=sys.argv[2], scale="unit")
found = [p.A.detach().tolist() for p in find_pairs(model).pairs]
everyone = [None, None]
dist.all_gather_object(everyone, found)
if dist.get_rank() == 0:
    print(json.dumps({"same": everyone[0] == everyone[1], "A": found}))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_ranks_add_up(tiny, estimator):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = str(Path(__file__).parent)
    workers = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WORKER, here, estimator]
        workers.append(
            subprocess.Popen(
                command,
                env={**os.environ, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (out, errors), _ = [worker.communicate(timeout=300) for worker in workers]
    assert workers[0].returncode == 0, errors
    answer = json.loads(out.splitlines()[-1])
    assert answer["same"]

    model = tiny.adapted(tiny.llama())
    lora_ga.initialize(model, tiny.batches(), estimator=estimator, scale="unit")
    for pair, A in zip(find_pairs(model).pairs, answer["A"], strict=True):
        # Projectors: singular vectors are known up to their signs.
        own, other = pair.A.detach(), torch.tensor(A)
        torch.testing.assert_close(own.mT @ own, other.mT @ other, rtol=0, atol=2e-3)
