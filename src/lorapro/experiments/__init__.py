"""Training, comparing and evaluating methods on real models (behind the command line).

The core (:mod:`lorapro.functional`, :mod:`lorapro.optim`, ...) never imports this package.
Importing it loads neither transformers nor peft: modules import them where they are used.

=============== ==========================================================================
module          subject
=============== ==========================================================================
``config``      one flat YAML plus ``--flag value`` overrides -> a checked :class:`Config`
``methods``     what a method is: adapter, initialisation, optimizer, usual learning rate
``tasks``       data, model class, collator and metric of a task
``assets``      models and data that lie inside PyPI packages
``runner``      one run: train, evaluate, save
``compare``     methods x learning rates x seeds, resumable
``statistics``  mean, deviation, intervals, share of a gap closed
``report``      the table and the loss-curve figure
``evaluation``  exact match by batched greedy generation
=============== ==========================================================================
"""

from __future__ import annotations

__all__: list[str] = []
