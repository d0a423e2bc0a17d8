"""The report: one self-contained page that shows every policy and claims no more than the numbers do."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orderrl.report import PolicyDetail, figures, markdown, write_report
from orderrl.report.page import COLUMNS, shown_columns, summary

VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


def row(policy: str, gain: float | None, R: int | None = None, **values: Any) -> dict[str, Any]:
    return (
        dict.fromkeys(column.key for column in COLUMNS)
        | {
            "policy": policy,
            "R": R,
            "gain_auc": gain,
            "gain_auc_ci": None if gain is None else [gain - 0.01, gain + 0.01],
        }
        | values
    )


def detail(name: str, seed: int = 0) -> PolicyDetail:
    rng = np.random.default_rng(seed)
    gain = np.sort(rng.random(5))
    return PolicyDetail(
        name=name,
        fraction=[0, 0.25, 0.5, 0.75, 1],
        gain_mean=gain.tolist(),
        gain_low=(gain - 0.1).tolist(),
        gain_high=(gain + 0.1).tolist(),
        mean_reveal_step=rng.random((4, 4)).tolist(),
        strips=torch.from_numpy(rng.integers(0, 256, (2, 3, 3, 8, 8), dtype=np.uint8)),
        strip_fractions=[0.0, 0.125, 1.0],
    )


def comparison(low: float, high: float, name: str = "bc_utility - raster", metric: str = "gain_auc") -> dict[str, Any]:
    return {"name": name, "metric": metric, "mean": (low + high) / 2, "low": low, "high": high}


RESULTS: dict[str, Any] = {
    "protocol": {"data": "digits", "split": "test", "images": 297, "guidance": None},
    "rows": [
        row("raster", 0.064, frechet_distance=2.5, features="orderrl-digits", steps=16.0),
        row("oracle", 0.148, budgets=[1]),
        row("bc_utility", 0.09, R=2, budgets=[1, 2, 4], regret=0.0123),
        row("real_floor", None, frechet_distance=0.31, features="orderrl-digits"),
    ],
    "comparisons": [comparison(0.02, 0.03), comparison(-0.4, 0.2, "bc_utility - multiscale", "decode_nll")],
}


class Page(HTMLParser):
    """Checks nesting, and collects tags and the table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    path = write_report(folder, RESULTS, [detail("raster"), detail("oracle", 1), detail("bc_utility", 2)])
    assert path == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_page_is_well_formed_and_needs_no_network(page: str) -> None:
    tags = Page(page).tags
    for tag, attributes in tags:
        assert tag not in ("script", "link", "iframe")
        for key in ("src", "href", "xlink:href", "srcset"):
            if key in attributes:
                assert attributes[key].startswith(("data:image/png;base64,", "#")), attributes[key]
    assert not re.search(r"https?://|@import", page)
    assert all(re.fullmatch(r"url\(#[\w-]+\)", found) for found in re.findall(r"url\([^)]*\)", page))


def test_every_picture_has_an_alternative_text(page: str) -> None:
    tags = Page(page).tags
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert sum(tag == "img" for tag, _ in tags) == 1 + 3 + 2 * 3  # scale, maps, strips
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(drawings) == 2
    assert all(drawing["aria-label"] and "width" not in drawing for drawing in drawings)


def test_identifiers_are_unique(page: str) -> None:
    found = [attributes["id"] for _, attributes in Page(page).tags if "id" in attributes]
    assert len(found) == len(set(found))


def test_table_has_a_cell_for_every_column_of_every_policy_and_dashes_for_null(page: str) -> None:
    cells = Page(page).cells
    width = len(shown_columns(RESULTS["rows"]))
    table = [cells[k : k + width] for k in range(0, width * (1 + len(RESULTS["rows"])), width)]
    assert [line[0] for line in table[1:]] == [entry["policy"] for entry in RESULTS["rows"]]
    keys = [column.key for column in shown_columns(RESULTS["rows"])]
    for line, entry in zip(table[1:], RESULTS["rows"], strict=True):
        for key, cell in zip(keys, line, strict=True):
            assert (cell == "–") == (entry[key] is None), (key, cell)
    learned = dict(zip(keys, table[3], strict=True))
    assert learned["budgets"] == "1, 2, 4"
    assert learned["gain_auc"].startswith("0.0900")
    assert "0.0800 to 0.1000" in learned["gain_auc"]
    assert learned["regret"] == "0.0123"


def test_every_issue_column_is_shown_and_explained() -> None:
    named = (
        "policy objective budgets R seed gain_auc likelihood_return far_gain decode_nll decode_loss "
        "recognisability_auc "
        "oracle_top1 oracle_spearman regret steps decode_calls seconds_per_image frechet_distance inception_score kid "
        "precision recall spatial_frechet_distance features accuracy"
    )
    assert [column.key for column in COLUMNS] == named.split()
    assert all(column.meaning for column in COLUMNS)


def test_fid_is_written_only_for_inception_features(page: str, tmp_path: Path) -> None:
    assert "FID ↓" not in page
    scores: dict[str, Any] = {"frechet_distance": 9.0, "kid": 0.01, "spatial_frechet_distance": 7.0}
    rows = [row("raster", 0.06, features="inception-v3-compat", **scores)]
    text = write_report(tmp_path, {"protocol": {}, "rows": rows}, []).read_text(encoding="utf-8")
    assert all(header in text for header in (">FID ↓", ">KID ↓", ">sFID ↓"))


def test_sample_quality_is_shown_where_a_row_has_it(page: str, tmp_path: Path) -> None:
    headers = ("inception score", "kernel distance", "precision", "recall", "spatial Fréchet")
    assert not any(header in page for header in headers)
    assert not any(header in markdown.markdown_table(RESULTS["rows"]) for header in headers)
    scored: dict[str, Any] = {
        "inception_score": 9.5,
        "kid": -0.0012,
        "precision": 0.75,
        "recall": 0.5,
        "spatial_frechet_distance": 3.25,
    }
    rows = [row("raster", 0.06, frechet_distance=9.0, features="orderrl-digits", **scored), row("oracle", 0.1)]
    text = write_report(tmp_path, {"protocol": {}, "rows": rows}, []).read_text(encoding="utf-8")
    for header, shown in zip(headers, ("9.50", "−0.0012", "75.0", "50.0", "3.25"), strict=True):
        assert header in text and shown in text
    table = markdown.markdown_table(rows)
    assert all(header in table for header in headers) and "| 9.50 | -0.0012 | 0.750 | 0.500 | 3.25 |" in table
    del rows[1]["kid"]  # results of an earlier version
    assert "kernel distance" in markdown.markdown_table(rows)


def test_only_intervals_without_zero_are_bold(page: str) -> None:
    assert "<b>+0.0250</b>" in page
    assert "−0.40 to +0.20" in page
    assert page.count("<b>") == 1


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    name = '<script>alert("$x_1$")</script>&'
    results = {
        "protocol": {"<i>key": "<i>value"},
        "rows": [row("raster", 0.06), row(name, 0.07, R=1)],
        "comparisons": [comparison(0.01, 0.02, f"{name} - raster")],
    }
    text = write_report(tmp_path, results, [detail(name), detail("raster")]).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;" in text
    Page(text)


@pytest.mark.parametrize(
    ("comparisons", "said"),
    [
        ([comparison(0.02, 0.03)], "beats raster:"),
        ([comparison(-0.01, 0.03)], "No learned planner beats raster beyond chance"),
        ([comparison(-0.03, -0.02)], "No learned planner beats raster: the best, bc_utility, is worse"),
        ([comparison(0.02, 0.03, metric="decode_nll")], "no paired interval was computed"),
        (None, "no paired interval was computed"),
    ],
)
def test_summary_claims_what_the_interval_allows(comparisons: list[dict[str, Any]] | None, said: str) -> None:
    sentence = summary(RESULTS | {"comparisons": comparisons})
    assert said in sentence
    assert "0.0900 against 0.0640" in sentence


def test_summary_averages_seeds_and_never_takes_a_baseline_for_a_planner() -> None:
    rows = [row("raster", 0.06), row("oracle", 0.2), row("a", 0.05, R=0), row("a", 0.09, R=0), row("b", 0.08, R=0)]
    assert "best learned planner, b," in summary({"protocol": {}, "rows": rows})
    assert summary({"protocol": {}, "rows": rows[:2]}) == "No learned planner was evaluated."


def test_figures_lie_beside_the_page(folder: Path) -> None:
    names = {path.name for path in folder.glob("*.png")}
    assert names == {"gain_auc.png", "gain_curves.png", "mean_orders.png", "strips_1.png", "strips_2.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def test_page_without_pictures_or_baselines_is_written(tmp_path: Path) -> None:
    text = write_report(tmp_path, {"protocol": {}, "rows": []}, []).read_text(encoding="utf-8")
    Page(text)
    assert "No learned planner was evaluated." in text


def test_strips_keep_every_pixel() -> None:
    strip = detail("x").strips[0]
    pixels = figures.strip_pixels(strip)  # 3 pictures of 8 pixels, gaps of 1
    assert pixels.shape == (8, 26, 4)
    for moment in range(3):
        part = pixels[:, 9 * moment : 9 * moment + 8]
        assert torch.equal(torch.from_numpy(part[..., :3].copy()).permute(2, 0, 1), strip[moment])
        assert (part[..., 3] == 255).all()
    assert (pixels[:, 8, 3] == 0).all()


def test_maps_share_one_colour_scale() -> None:
    low, high = figures.colour_pixels(np.array([[0.0, 1.0]]))[0]
    other = figures.colour_pixels(np.array([[0.0, 0.5, 1.0]]))[0]
    assert (other[0] == low).all()
    assert (other[2] == high).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tmp: write_report(tmp, {"rows": []}, []), "results must have the key 'protocol', got 'rows'"),
        (lambda tmp: write_report(tmp, {"protocol": {}, "rows": [{}]}, []), "name a policy in every row"),
        (
            lambda tmp: PolicyDetail("x", [0.0, 1.0], [0.0], [0.0], [0.0], [[0.0]], torch.zeros(1), [0.0]),
            "gain_mean of 'x' must have one value for each of the 2 fractions, got 1",
        ),
        (
            lambda tmp: PolicyDetail("x", [0.0], [0.0], [0.0], [0.0], [[0.0]], torch.zeros(1, 2, 3, 8, 8), [0.0, 1.0]),
            "strips of 'x' must be uint8",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[..., object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_markdown_joins_seeds_and_shows_null_as_dash() -> None:
    row = dict.fromkeys(markdown.COLUMNS) | {"policy": "planner", "seed": 0, "gain_auc": 0.1}
    text = markdown.markdown_table([row, row | {"seed": 1, "gain_auc": 0.3}, row | {"policy": "raster", "seed": None}])
    planner, raster = text.splitlines()[2:]
    assert planner.startswith("| planner | 2 | 0.2000 ± 0.1414 | – |")
    assert raster.startswith("| raster | – | 0.1000 |")


def test_markdown_marks_intervals_that_exclude_zero() -> None:
    entry = {"name": "a - b", "metric": "decode_nll", "mean": -0.5, "low": -0.9, "high": -0.1}
    assert "**-0.50**" in markdown.markdown_comparisons([entry])
    assert "**" not in markdown.markdown_comparisons([entry | {"high": 0.1}]).splitlines()[2]
