"""Results as files: ``summary.json``, ``cases.csv``, tables for a paper, figures and one self-contained ``report.html``, of one model or of several side by side.

Needs the extra ``train``.
"""

from densecal.pictures import label_overlay
from densecal.report.comparison import write_comparison
from densecal.report.page import write_report
from densecal.report.slices import Example
from densecal.report.summary import SCHEMA_VERSION

__all__ = ["SCHEMA_VERSION", "Example", "label_overlay", "write_comparison", "write_report"]
