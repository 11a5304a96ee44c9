"""Reports of experiments: tables, figures and one self-contained page.

``tables``, ``rate_tables`` and ``summary_tables`` hold the printed tables, ``figures`` and
``diagnostic_figures`` the figures, ``verdicts`` the sentences, ``html`` the page; all are functions
of the tidy table of :mod:`lorapro.experiments.results`, split into ``problems`` and compared in
``comparison``.
"""

from __future__ import annotations

from lorapro.experiments.report.write import Report, print_tables, report_comparison

__all__ = ["Report", "print_tables", "report_comparison"]
