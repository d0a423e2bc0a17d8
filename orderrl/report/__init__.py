"""Reports of an evaluation: tables on screen and in Markdown, and one self-contained page with its pictures."""

from typing import TYPE_CHECKING

from orderrl.runtime.lazy import lazily

if TYPE_CHECKING:
    from orderrl.report.output import write_all
    from orderrl.report.page import write_report

__all__ = ["write_all", "write_report"]

# Matplotlib takes long to import
__getattr__, __dir__ = lazily(
    __name__, {"orderrl.report.output": ("write_all",), "orderrl.report.page": ("write_report",)}
)
