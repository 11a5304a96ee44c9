"""See the alignment: ranks, distances to the full gradient, predicted and realised decrease.

::

    with lorapro.diagnostics.watch(model):          # before the forward pass
        model(**batch).loss.backward()
        for record in lorapro.diagnostics.measure(model):
            print(record.name, record.lora_distance, record.aligned_distance)

:func:`follow` does this every few steps of a loop, :class:`AlignmentCallback` under ``Trainer``;
both write ``diagnostics.jsonl``, one :class:`PairRecord` a line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorapro.diagnostics.following import FILE as FILE
from lorapro.diagnostics.following import Follower as Follower
from lorapro.diagnostics.following import follow as follow
from lorapro.diagnostics.measuring import measure as measure
from lorapro.diagnostics.records import PairRecord as PairRecord
from lorapro.diagnostics.records import read_records as read_records
from lorapro.diagnostics.records import summary as summary
from lorapro.diagnostics.watching import Watch as Watch
from lorapro.diagnostics.watching import watch as watch

if TYPE_CHECKING:
    from lorapro.diagnostics.callback import AlignmentCallback as AlignmentCallback


def __getattr__(name: str) -> Any:
    if name == "AlignmentCallback":  # needs transformers, the others do not
        from lorapro.diagnostics.callback import AlignmentCallback

        return AlignmentCallback
    raise AttributeError(f"module 'lorapro.diagnostics' has no attribute {name!r}")
