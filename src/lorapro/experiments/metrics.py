"""Metrics of what a model predicted: scikit-learn's, behind one interface."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

__all__ = ["label_metrics"]


def label_metrics(labels: Any, predictions: Any) -> dict[str, float]:
    """Accuracy, macro F1, Matthews correlation, and the F1 of label 1 where there are two.

    Args:
        labels: true class numbers, (examples,).
        predictions: predicted ones, (examples,).

    >>> label_metrics([0, 1, 1, 0], [0, 1, 0, 0])["accuracy"]
    0.75
    """
    import numpy as np
    from sklearn import metrics

    truth: ndarray = np.asarray(labels)
    guess: ndarray = np.asarray(predictions)
    known = np.unique(truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single predicted class: the scores are 0, as they say
        found = {
            "accuracy": metrics.accuracy_score(truth, guess),
            "macro_f1": metrics.f1_score(
                truth, guess, average="macro", labels=known, zero_division=0
            ),
            "matthews_correlation": metrics.matthews_corrcoef(truth, guess),
        }
        if set(known.tolist()) <= {0, 1}:
            found["f1"] = metrics.f1_score(truth, guess, zero_division=0)
    return {name: float(value) for name, value in found.items()}
