"""The report: one self-contained HTML page with the table, the figures and the order viewer of an evaluation."""

from orderrl.report.detail import Curve, Episode, Examples, PolicyDetail
from orderrl.report.page import write_report

__all__ = ["Curve", "Episode", "Examples", "PolicyDetail", "write_report"]
