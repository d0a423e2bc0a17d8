"""The report: one self-contained HTML page with the table, the curves and the pictures of an evaluation."""

from orderrl.report.figures import PolicyDetail
from orderrl.report.page import write_report

__all__ = ["PolicyDetail", "write_report"]
