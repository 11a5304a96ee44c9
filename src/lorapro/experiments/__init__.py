"""Training, comparing and evaluating methods on real models (behind the command line).

The core (:mod:`lorapro.functional`, :mod:`lorapro.optim`, ...) never imports this package.
Importing it loads neither transformers nor peft: modules import them where they are used.

================== ==========================================================================
module             subject
================== ==========================================================================
``options``        what a run can be told: how keys are declared, and the keys of every run
``keys``           every key of a config: who reads it, its default and type; parsing
``config``         one flat YAML plus ``--flag value`` -> a checked ``RunConfig``, its fingerprint
``methods``        how to train: adapter x start x optimizer, three catalogues
``tasks``          what to train on: one entry a task, one class a family of tasks
``toys``           tiny random models and written data: any recipe offline, in a minute
``metrics``        scores of predictions, scikit-learn's
``scoring``        generated answers: GSM8K, HumanEval in a sandbox, MT-Bench, lm-eval
``data``           rows of a file, a folder, an asset or a hub data set
``assets``         models and data that lie inside packages
``model_building`` from a task and a method to the model that is trained
``evaluation``     Trainer with one way to evaluate: every example scored
``runner``         one run: train, evaluate, save
``folders``        what lies in a run's folder; the format of ``result.json``
``plan``           a recipe -> cells of runs (tasks x methods x grid)
``sweep``          execution of a plan: rates picked on validation data, resumable
``workers``        where runs are run: here, in several processes, on a Ray cluster
``restore``        models from what was saved
``results``        all runs -> one tidy table, a row a run; its compact form ``results.json``
``statistics``     paired intervals, corrections, shares of a gap; ``rates``: learning rates
``report``         tables, figures and one page, all functions of the tidy table
================== ==========================================================================
"""

from __future__ import annotations

__all__: list[str] = []
