"""All that an evaluation's report consists of: page, figures, animation and tables."""

from pathlib import Path
from typing import Any

from orderrl.evaluation.detail import Pictures
from orderrl.report.animation import save_orders
from orderrl.report.markdown import markdown_comparisons, markdown_table
from orderrl.report.page import write_report
from orderrl.report.screen import print_comparisons, print_results


def write_all(folder: Path, results: dict[str, Any], pictures: Pictures) -> Path:
    """Write page, figures, `orders.gif` and `results.md`, print the main columns, and return the path of the page.

    Arguments as in `write_report`.
    """
    page = write_report(folder, results, pictures)
    if pictures.examples is not None:
        save_orders(folder / "orders.gif", pictures.details, pictures.examples)
    tables = markdown_table(results["rows"]) + "\n" + markdown_comparisons(results["comparisons"])
    (folder / "results.md").write_text(tables, encoding="utf-8")
    print_results(results["rows"], results["comparisons"])
    print_comparisons(results["comparisons"])
    return page
