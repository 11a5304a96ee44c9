from __future__ import annotations

import gc

import pytest

from experiments.judge import judge_server
from experiments.tiny_models import classify, problems, solve, table, tiny_bert, tiny_llama

__all__ = ["classify", "judge_server", "problems", "solve", "table", "tiny_bert", "tiny_llama"]


@pytest.fixture(autouse=True, scope="session")
def frozen_imports():
    """Take the libraries' objects out of garbage collection: Trainer collects at every start."""
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
