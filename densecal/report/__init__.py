"""A run's results as files: ``summary.json``, ``cases.csv``, figures and one self-contained ``report.html``. Needs the extra ``train``."""

from densecal.report.page import write_report
from densecal.report.slices import Example
from densecal.report.summary import SCHEMA_VERSION

__all__ = ["SCHEMA_VERSION", "Example", "write_report"]
