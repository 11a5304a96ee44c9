"""A disk that fills up while a run saves: one line, and the run goes on from what is whole."""

from __future__ import annotations

import sys

import pytest

from experiments.tiny_models import write_yaml
from lorapro.checkpoints import last_complete
from lorapro.cli.main import main


@pytest.mark.skipif(sys.platform == "win32", reason="needs file limits")
def test_train_says_that_the_disk_is_full_and_goes_on_later(classify, tmp_path, capsys):
    import resource

    values = {**classify, "save_strategy": "steps", "save_steps": 2}
    config = str(write_yaml(tmp_path / "c.yaml", values))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # of each file
    try:
        status = main(["train", config])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert status == 2
    assert "lorapro: error: the disk is full" in said
    assert "Traceback" not in said
    assert list((tmp_path / "run").glob("checkpoint-2/*"))
    assert last_complete(tmp_path / "run") is None
    assert main(["train", config]) == 0
