"""The report: one self-contained page that shows every policy and claims no more than the numbers do."""

import base64
import html
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from orderrl.data.pictures import HIDDEN_GREY
from orderrl.evaluation.columns import empty_row, shown_columns
from orderrl.evaluation.detail import Curve, Episode, Examples, Pictures, PolicyDetail
from orderrl.metrics.statistics import RULE
from orderrl.report import figures, markdown, style, viewer, write_report
from orderrl.report.cost import Point, cost_figure, cost_points, pareto_front
from orderrl.report.page import report_page
from orderrl.report.summary import summary
from tests.report_data import BLOCKS, RESULTS, comparison, detail, details, drawn, episode, examples, reliability, row

VOID = {"meta", "img", "br", "link", "input", "hr", "wbr", "image", "use", "path"}


class Page(HTMLParser):
    """Checks nesting, and collects tags, the cells of the sortable table of results and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.lines: list[list[str]] = []
        self.data: dict[str, str] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or dict(attrs).get("id") or ""))
        if self.in_results:
            if tag == "tr":
                self.lines.append([])
            if tag in ("td", "th"):
                self.lines[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.in_results and self.open[-1][0] not in ("table", "tr", "thead", "tbody"):
            self.lines[-1][-1] += data.strip()
        if self.open and self.open[-1][0] == "script":
            self.data[self.open[-1][1]] = data

    @property
    def in_results(self) -> bool:
        return ("table", "results sortable") in self.open


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    path = write_report(folder, RESULTS, Pictures(details(), examples(), drawn("raster", "bc_utility")))
    assert path == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


# -- the page ---------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_needs_no_network(page: str) -> None:
    tags = Page(page).tags
    for tag, attributes in tags:
        assert tag != "iframe" and not (tag == "script" and "src" in attributes)
        for key in ("src", "href", "xlink:href", "srcset"):
            if key in attributes:
                assert attributes[key].startswith(("data:image/png;base64,", "data:,", "#")), attributes[key]
    assert set(re.findall(r"https?://[^\"' ]*", page)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "@import" not in page
    assert all(re.fullmatch(r"url\(#[\w-]+\)", found) for found in re.findall(r"url\([^)]*\)", page))
    (policy,) = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_every_picture_has_an_alternative_text(page: str) -> None:
    tags = Page(page).tags
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert sum(tag == "img" for tag, _ in tags) == 1 + 4 + 2  # colour scale, maps, drawn images
    drawings = [attributes for tag, attributes in tags if attributes.get("role") == "img"]
    assert all(drawing["aria-label"] for drawing in drawings)
    strips = [drawing for drawing in drawings if drawing.get("class") == "moments"]
    assert len(strips) == 3 * 4  # images, policies of one block a step
    named = [a["aria-label"].partition(".")[0] for a in drawings if a.get("aria-label", "").count(". ")]
    assert named == [
        "Information-gain AUC",
        "Information gained against revealed fraction",
        "Recognisability against revealed fraction",
        "Quality against steps",
        "Quality against time",
        "Calibration",
    ]


def test_identifiers_are_unique_and_links_lead_somewhere(page: str) -> None:
    tags = Page(page).tags
    found = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(found) == len(set(found))
    wanted = [a[key][1:] for _, a in tags for key in ("href", "xlink:href") if a.get(key, "").startswith("#")]
    assert set(wanted) <= set(found)


def test_table_has_a_cell_for_every_column_of_every_policy_and_dashes_for_null(page: str) -> None:
    columns = list(itertools.chain.from_iterable(shown_columns(RESULTS["rows"]).values()))
    groups, headers, *lines = Page(page).lines
    assert groups == ["", "planning", "agreement", "cost", "samples", "setting"]
    assert [len(line) for line in (headers, *lines)] == [len(columns)] * (1 + len(RESULTS["rows"]))
    assert [line[0] for line in lines] == [entry["policy"] for entry in RESULTS["rows"]]
    for line, entry in zip(lines, RESULTS["rows"], strict=True):
        for column, cell in zip(columns, line, strict=True):
            assert (cell == "–") == (entry[column.name] is None), (column.name, cell)
    learned = dict(zip([column.name for column in columns], lines[4], strict=True))
    assert learned["budgets"] == "1, 2, 4"
    assert learned["gain_auc"] == "0.09000.0800 to 0.1000"
    assert learned["regret"] == "0.0123"
    assert "kid" not in learned


def test_cells_carry_what_they_are_sorted_by(page: str) -> None:
    values = [a["data-sort"] for tag, a in Page(page).tags if tag in ("td", "th") and "data-sort" in a]
    assert {"0.09", "", "raster", "77.2"} <= set(values)


def test_fid_is_written_only_for_inception_features(page: str, tmp_path: Path) -> None:
    assert "FID ↓" not in page
    scores: dict[str, Any] = {"frechet_distance": 9.0, "kid": 0.01, "spatial_frechet_distance": 7.0}
    rows = [row("raster", 0.06, features="inception-v3-compat", **scores)]
    text = report_page({"protocol": {}, "rows": rows}, Pictures())[0]
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
    text = report_page({"protocol": {}, "rows": rows}, Pictures())[0]
    for header, shown in zip(headers, ("9.50", "−0.0012", "75.0", "50.0", "3.25"), strict=True):
        assert header in text and shown in text
    table = markdown.markdown_table(rows)
    assert all(header in table for header in headers) and "| 9.50 | −0.0012 | 75.0 | 50.0 | 3.25 |" in table
    del rows[1]["kid"]  # results of an earlier version
    assert "kernel distance" in markdown.markdown_table(rows)


def test_masked_models_have_no_nats(tmp_path: Path) -> None:
    results = {"protocol": {}, "rows": [row("raster", 0.06, decode_loss=3.0, regret=0.1)]}
    text = report_page(results, Pictures([detail("raster")], examples()))[0]
    assert "nats per token" not in text and "DiffLoss per token" in text


def test_only_differences_that_are_found_are_bold(page: str, tmp_path: Path) -> None:
    assert page.count("<b>") == 1 and "<b>+0.0250</b>" in page
    assert "−0.40 to +0.20" in page and RULE in html.unescape(page)
    corrected = comparison(0.02, 0.03) | {"p_holm": 0.07, "effect_size": -0.21}
    text = report_page(RESULTS | {"comparisons": [corrected]}, Pictures())[0]
    assert "<b>" not in text and ">0.070<" in text and ">−0.21<" in text


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    name = '<script>alert("$x_1$")</script>&'
    results = {
        "protocol": {"<i>key": "<i>value"},
        "rows": [row("raster", 0.06), row(name, 0.07, R=1, reliability=reliability(0.1))],
        "comparisons": [comparison(0.01, 0.02, f"{name} - raster")],
    }
    text = report_page(results, Pictures([detail(name), detail("raster")], examples()))[0]
    assert "<script>alert" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;" in text
    assert json.loads(Page(text).data["viewer-data"])["policies"][0]["name"] == name


def test_page_without_pictures_or_baselines_is_written(tmp_path: Path) -> None:
    text = report_page({"protocol": {}, "rows": []}, Pictures())[0]
    Page(text)
    assert "No learned planner was evaluated." in text
    assert "viewer-data" not in text


def test_figures_lie_beside_the_page(folder: Path) -> None:
    names = [
        *("calibration", "gain_auc", "gain_curves", "mean_orders", "quality_seconds", "quality_steps"),
        *("recognisability_curves", "samples", "strips_1", "strips_2", "strips_3"),
    ]
    found = sorted(path.name for path in (folder / "figures").iterdir())
    assert found == [f"{name}.{suffix}" for name in names for suffix in ("pdf", "png", "svg")]
    begin = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert all(path.read_bytes().startswith(begin[path.suffix]) for path in (folder / "figures").iterdir())


def test_figures_for_papers_fit_a_column_and_embed_their_fonts(folder: Path) -> None:
    found = list((folder / "figures").glob("*.pdf"))
    assert len(found) > 10
    for written in (path.read_bytes() for path in found):
        (width,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ", written)
        assert float(width) <= 3.3 * 72 + 0.1
        assert b"/FontFile2" in written and b"/Type3" not in written


def test_names_beside_pictures_are_not_cut_off(tmp_path: Path) -> None:
    shown = [detail("raster"), detail("my_module:a_policy_of_mine"), detail("c")]
    pictures = drawn(*(each.name for each in shown), images=20)
    said = dict.fromkeys([each.name for each in shown], "Fréchet distance 173.59")
    for figure in (figures.strips_figure(shown, examples(), 0), figures.samples_figure(pictures, said)):
        style.save_figure(figure, tmp_path / "figure.png")
        figure.set_dpi(144)  # as it was written
        taken, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert taken.x0 >= 0 and taken.y0 >= 0 and taken.x1 <= width and taken.y1 <= height


def test_drawn_images_stand_beside_their_distance(tmp_path: Path) -> None:
    rows = [row("raster", 0.06, frechet_distance=2.25, features="own"), row("a", 0.1, R=0, seed=0)]
    text = report_page({"protocol": {}, "rows": rows}, Pictures(drawn=drawn("raster", "a", size=120)))[0]
    section = text.partition('<section aria-labelledby="samples">')[2].partition("</section>")[0]
    found = re.findall(r'base64,(.*?)" alt="(.*?)"><figcaption>(.*?)</figcaption>', section)
    assert [alt for _, alt, _ in found] == ["6 images drawn by raster", "6 images drawn by a"]
    captions = [re.sub("<.*?>", "", caption) for _, _, caption in found]
    assert captions == ["raster, Fréchet distance 2.25", "a"]
    with Image.open(io.BytesIO(base64.b64decode(found[0][0]))) as picture:
        assert 3 * 100 <= picture.width < 3 * 120  # three columns; what is large is made small


# -- the summary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("comparisons", "said"),
    [
        ([comparison(0.02, 0.03)], "beats raster:"),
        ([comparison(-0.01, 0.03)], "No learned planner beats raster beyond chance"),
        ([comparison(0.02, 0.03) | {"p_holm": 0.07}], "No learned planner beats raster beyond chance"),
        ([comparison(-0.03, -0.02)], "No learned planner beats raster: the best, bc_utility, is worse"),
        ([comparison(0.02, 0.03, metric="decode_nll")], "no paired interval was computed"),
        (None, "no paired interval was computed"),
    ],
)
def test_summary_claims_what_the_interval_allows(comparisons: list[dict[str, Any]] | None, said: str) -> None:
    sentence = summary(RESULTS | {"comparisons": comparisons})
    assert sentence.startswith("1 learned planner and 4 other policies on digits/test, 297 images.")
    assert said in sentence
    assert "0.0900 against 0.0640" in sentence


def test_summary_averages_seeds_and_never_takes_a_baseline_for_a_planner() -> None:
    rows = [row("raster", 0.06), row("oracle", 0.2), row("a", 0.05, R=0), row("a", 0.09, R=0), row("b", 0.08, R=0)]
    assert "best learned planner, b," in summary({"protocol": {}, "rows": rows})
    assert summary({"protocol": {}, "rows": rows[:2]}).endswith("No learned planner was evaluated.")


@pytest.mark.parametrize(("high", "said"), [(0.03, "is above"), (0.05, "does not differ significantly from")])
def test_summary_says_how_a_users_policy_did(high: float, said: str) -> None:
    found = [comparison(0.01 if high == 0.03 else -0.01, high, "mine:play - raster")]
    rows = [row("raster", 0.06), row("mine:play", 0.08, own=True)]
    assert f"mine:play {said} raster in information-gain AUC (paired" in summary(
        {"protocol": {}, "rows": rows, "comparisons": found}
    )


def test_summary_names_the_strongest_rival_but_no_reference() -> None:
    rows = [row(name, gain) for name, gain in (("raster", 0.06), ("fitted", 0.08), ("halton", 0.07), ("oracle", 0.2))]
    names = [entry["policy"] for entry in rows]
    found = [comparison(-0.02, -0.01, f"a - {name}") for name in names]
    sentence = summary({"protocol": {}, "rows": [*rows, row("a", 0.05, R=0)], "comparisons": found})
    assert "behind the strongest other order, fitted (paired difference −0.0150" in sentence
    assert "oracle" not in sentence


def test_planners_for_code_length_are_judged_by_it() -> None:
    ppo = row("ppo", 0.05, R=2, objective="likelihood", decode_nll=76.9, steps=5.3)
    found = [
        comparison(0.5, 1.1, "ppo - raster", "decode_nll"),
        comparison(-0.9, -0.5, "ppo - random at 5.3 steps", "decode_nll"),
        comparison(-0.6, -0.02, "ppo - halton at 5.3 steps", "decode_nll"),
    ]
    sentence = summary({"protocol": {}, "rows": [row("raster", 0.06), ppo], "comparisons": found})
    assert "For code length ppo needs 76.90 nats per image in 5.3 steps; raster's is shorter" in sentence
    assert "that of halton at 5.3 steps is longer (paired difference −0.31" in sentence
    assert "information-gain" not in sentence
    masked = ppo | {"decode_nll": None, "decode_loss": 3.25}
    sentence = summary({"protocol": {}, "rows": [row("raster", 0.06), masked], "comparisons": found})
    assert "For decode loss ppo needs 3.250 DiffLoss per image in 5.3 steps; raster's is shorter" in sentence


# -- the viewer -------------------------------------------------------------------------------------------------------


def test_viewer_data_gives_back_steps_losses_and_scores() -> None:
    known = details()
    text, images = viewer.viewer_data(known, examples(), "nats per token")
    data = json.loads(text)
    assert images == 4 and (data["rows"], data["columns"], data["unit"]) == (4, 4, "nats per token")
    assert [policy["name"] for policy in data["policies"]] == [found.name for found in known]
    for policy, found in zip(data["policies"], known, strict=True):
        for encoded, original in zip(policy["episodes"], found.episodes, strict=True):
            assert encoded["steps"] == [list(step) for step in original.steps]
            assert encoded["loss"] == pytest.approx(list(original.loss), rel=1e-3)
            assert (encoded["scores"] is None) == (original.scores is None)
            if original.scores is None:
                continue
            hidden = set(range(BLOCKS))
            for step, blocks in enumerate(original.steps):
                low, high = encoded["ranges"][step]
                levels = [data["levels"].index(character) for character in encoded["scores"][step]]
                decoded = [low + level * (high - low) / (len(data["palette"]) - 1) for level in levels]
                true = original.scores[step, sorted(hidden)].tolist()
                assert decoded == pytest.approx(true, abs=0.51 * (high - low) / 63 + 1e-3)
                hidden -= set(blocks)


def test_viewer_drops_images_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = [detail("a"), detail("b", 1)]
    whole, images = viewer.viewer_data(known, examples(), "nats")
    assert images == 4
    monkeypatch.setattr(viewer, "MAX_CHARACTERS", len(whole) // 2)
    half, images = viewer.viewer_data(known, examples(), "nats")
    assert images == 2 and len(half) < len(whole)
    assert [len(policy["episodes"]) for policy in json.loads(half)["policies"]] == [2, 2]
    page = report_page(RESULTS, Pictures(known, examples()))[0]
    assert page.count('<image id="example-') == page.count("<h3>Image ") == 2


def test_thirty_policies_on_a_grid_of_64_blocks_stay_below_ten_megabytes() -> None:
    rng = np.random.default_rng(0)
    steps = [[block] for block in range(64)]
    scores = torch.from_numpy(rng.normal(size=(64, 64)).astype(np.float32))
    curve = Curve([0, 1], [0, 1], [0, 1], [0, 1])
    one = Episode(steps, rng.random(65).tolist(), scores)
    many = [PolicyDetail(str(index), curve, rng.random((8, 8)).tolist(), [one] * 8) for index in range(30)]
    shown = Examples(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), [0] * 8, 8, 8)
    text, images = viewer.viewer_data(many, shown, "nats")
    assert images == 8 and len(text) < 3_000_000


def test_equal_scores_have_the_middle_colour() -> None:
    scores = torch.zeros(BLOCKS, BLOCKS)
    flat = Episode([[block] for block in range(BLOCKS)], [0.0] * (BLOCKS + 1), scores)
    curve = Curve([0, 1], [0, 1], [0, 1], [0, 1])
    known = [PolicyDetail("flat", curve, np.zeros((4, 4)).tolist(), [flat] * 4)]
    data = json.loads(viewer.viewer_data(known, examples(), "nats")[0])
    assert set("".join(data["policies"][0]["episodes"][0]["scores"])) == {viewer.LEVELS[31]}


def test_partial_drawings_cover_exactly_the_hidden_blocks() -> None:
    shown = examples()
    found = episode(np.random.default_rng(5), budget=3)
    for taken in range(len(found.steps) + 1):
        drawing = viewer.partial_drawing("example-1", shown, found.reveal_step, taken)
        covered = {
            int(y) * 4 + int(x) + offset
            for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", drawing)
            for offset in range(int(length))
        }
        assert covered == set(range(BLOCKS)) - {block for step in found.steps[:taken] for block in step}


def test_strips_never_show_more_than_their_fraction() -> None:
    found = episode(np.random.default_rng(6), budget=3)  # 3, 6, 9, 12, 15, 16 of 16 blocks
    assert [viewer.steps_at(found, fraction) for fraction in figures.STRIP_FRACTIONS] == [0, 1, 2, 4, 6]


# -- figures ----------------------------------------------------------------------------------------------------------


def test_strips_figure_shows_true_pixels_and_grey() -> None:
    known, shown = [detail("raster"), detail("b", 1)], examples()
    figure = figures.strips_figure(known, shown, 2)
    (sheet,) = [np.asarray(image.get_array()) for image in figure.axes[0].get_images()]
    assert sheet.shape == (2 * 9, len(figures.STRIP_FRACTIONS) * 9, 3)  # pictures of 8 pixels, gaps of 1
    assert (sheet[:8, :8] == HIDDEN_GREY).all()
    assert (sheet[9:17, 36:44] == shown.images[2].permute(1, 2, 0).numpy()).all()
    half = known[1].episodes[2].reveal_step
    for block, step in enumerate(half):
        top, left = 9 + block // 4 * 2, 18 + block % 4 * 2
        true = shown.images[2][:, top - 9 : top - 7, left - 18 : left - 16].permute(1, 2, 0).numpy()
        assert (sheet[top : top + 2, left : left + 2] == (true if step < BLOCKS // 2 else HIDDEN_GREY)).all()


def test_maps_share_one_colour_scale() -> None:
    low, high = style.colour_pixels(np.array([[0.0, 1.0]]))[0]
    other = style.colour_pixels(np.array([[0.0, 0.5, 1.0]]))[0]
    assert (other[0] == low).all()
    assert (other[2] == high).all()
    figure = figures.orders_figure(details(), {})
    assert {image.get_clim() for image in figure.axes[0].get_images()} == {(0, 1)}


@pytest.mark.parametrize("higher", [False, True])
def test_pareto_front_is_what_no_other_point_beats(higher: bool) -> None:
    rng = np.random.default_rng(7)
    points = [Point(f"p{i}", float(c), float(q), f"p{i}") for i, (c, q) in enumerate(rng.integers(0, 12, (60, 2)))]

    def beats(one: Point, other: Point) -> bool:
        quality = one.quality >= other.quality if higher else one.quality <= other.quality
        return quality and one.cost <= other.cost and (one.cost, one.quality) != (other.cost, other.quality)

    expected = {(p.cost, p.quality) for p in points if not any(beats(other, p) for other in points)}
    front = pareto_front(points, higher)
    assert [(p.cost, p.quality) for p in front] == sorted(expected)


def test_costs_are_compared_among_comparable_rows() -> None:
    rows = RESULTS["rows"]
    steps = cost_points(rows, "steps", "decode_nll")
    assert [point.policy for point in steps] == ["raster", "random", "random@4", "bc_utility"]  # no oracle
    assert [point.family for point in steps] == ["raster", "random", "random", "bc_utility"]
    scored = row("halton", 0.1, budgets=[1], decode_nll=76.0, rollout_seconds_per_image=0.1)
    timed = cost_points([*rows, scored], "seconds_per_image", "decode_nll")
    assert [point.policy for point in timed] == ["random", "random@4"]  # those that drew samples
    seeds = [row("a", 0.1, R=0, budgets=[1], steps=s, decode_nll=n) for s, n in ((4.0, 70.0), (6.0, 80.0))]
    assert cost_points(seeds, "steps", "decode_nll") == [Point("a", 5.0, 75.0, "a")]


def test_a_line_joins_only_schedules_that_no_other_of_the_policy_beats() -> None:
    """Schedules of one order that are good and bad at nearly equal steps would otherwise be a zigzag line."""
    found = {4: 86.0, 5: 84.5, 5.5: 86.2, 6: 83.0, 8: 85.0, 16: 81.7}  # steps and code length
    rows = [
        row(f"diagonal@{s}", 0.1, steps=float(s), decode_nll=nats, family="diagonal", budgets=[1])
        for s, nats in found.items()
    ]
    (axes,) = cost_figure(rows, "steps").axes
    drawn = [line for line in axes.lines if line.get_marker() != "None" and line.get_markerfacecolor() != "none"]
    marks = sorted(x for line in drawn for x in np.asarray(line.get_xdata()))
    joined = [line for line in drawn if line.get_linestyle() == "-"]
    assert marks == sorted(found) and len(joined) == 1
    assert np.asarray(joined[0].get_xdata()).tolist() == [4, 5, 6, 16]
    assert (np.diff(np.asarray(joined[0].get_ydata())) < 0).all()


# -- Markdown ---------------------------------------------------------------------------------------------------------


def test_markdown_joins_seeds_and_shows_null_as_dash() -> None:
    planner = empty_row() | {"policy": "planner", "seed": 0, "gain_auc": 0.1}
    raster = planner | {"policy": "raster", "seed": None, "decode_nll": 76.123}
    text = markdown.markdown_table([planner, planner | {"seed": 1, "gain_auc": 0.3}, raster])
    header, _, *lines = text.splitlines()
    assert header == "| policy | seeds | gain AUC ↑ (share of loss) | decode NLL ↓ (nats per image) |"
    assert lines == ["| planner | 2 | 0.2000 ± 0.1414 | – |", "| raster | – | 0.1000 | 76.12 |"]


@pytest.mark.parametrize(
    "name",
    [
        "a|b", "`a|b`", "**loud**", "_soft_ but my_policy:near_by", "~~gone~~", "<img src=x>", "[x](https://y.z)",
        "a\\", "&lt;", "two\nlines", "a\\|b", "__init__", "tab\tand\u2028more", "/tmp/a_b.safetensors@cost0.5",
    ],
)  # fmt: skip
def test_markdown_shows_names_as_they_are(name: str) -> None:
    """Read by another program's parser, every cell is where it should be, and the name's holds its plain text."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    row = empty_row() | {"policy": name, "seed": 0, "gain_auc": 0.1}
    entry = comparison(0.1, 0.9, metric="decode_nll") | {"name": name}
    for text in (markdown.markdown_table([row]), markdown.markdown_comparisons([entry])):
        tokens = parser.parse(text)
        cells = [after for token, after in itertools.pairwise(tokens) if token.type == "td_open"]
        assert len(cells) == sum(token.type == "th_open" for token in tokens)
        assert {part.type for part in cells[0].children or []} <= {"text", "text_special"}
        assert "".join(part.content for part in cells[0].children or []) == " ".join(name.split())
