"""The report in a real browser: Chromium of the system or of Playwright; skipped where there is none."""

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orderrl.evaluation.detail import Pictures
from orderrl.report.page import report_page
from orderrl.report.runs_page import write_runs_page
from orderrl.report.style import colour_pixels
from tests.report_data import RESULTS, details, drawn, examples

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install -e '.[dev]')")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "microsoft-edge")
Page = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as control:
        if found is None and not Path(control.chromium.executable_path).exists():
            pytest.skip(f"no browser: none of {', '.join(NAMES)} on the path (apt-get install chromium)")
        started = control.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_page(RESULTS, Pictures(details(), examples(), drawn("raster")))[0], encoding="utf-8")
    return path.as_uri()


class Watched:
    """A page that takes down errors and what it asks the network for."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.locator('[data-part="viewer"]').wait_for(state="visible")


@pytest.fixture
def watched(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """A desktop page, or one with the context given as the fixture's parameter; no test may leave an error."""
    found = Watched(
        browser, address, **(getattr(request, "param", None) or {"viewport": {"width": 1280, "height": 800}})
    )
    yield found
    found.context.close()
    assert found.errors == []
    assert [url for url in found.requests if not url.startswith("data:")] == [address]


@pytest.fixture
def page(watched: Watched) -> Page:
    return watched.page


def part(page: Page, name: str) -> Any:
    return page.locator(f'[data-part="{name}"]')


def pixels(page: Page) -> list[int]:
    """All values of the viewer's canvas, RGB."""
    address = part(page, "image").evaluate("canvas => canvas.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
        return list(picture.convert("RGB").tobytes())


def expected_pixels(policy: int, image: int, step: int) -> list[int]:
    """The true image with the blocks that are hidden before a step grey, as RGB values."""
    shown, episode = examples(), details()[policy].episodes[image]
    picture = shown.images[image].permute(1, 2, 0).clone()
    for block, when in enumerate(episode.reveal_step):
        row, column = 2 * (block // 4), 2 * (block % 4)  # blocks of 2x2 pixels
        if when >= step:
            picture[row : row + 2, column : column + 2] = 128
    return picture.flatten().tolist()


def move_slider(page: Page, step: int) -> None:
    part(page, "step").fill(str(step))


def marks(page: Page, policy: int, image: int, step: int) -> None:
    """Image, outlines, scores, text and curve are those of a step."""
    episode = details()[policy].episodes[image]
    total = len(episode.steps)
    assert pixels(page) == expected_pixels(policy, image, step)
    chosen = [(block // 4, block % 4) for block in episode.steps[step]] if step < total else []
    drawn = (
        part(page, "marks")
        .locator("rect.chosen")
        .evaluate_all("all => all.map(r => [Math.floor(r.getAttribute('y')), Math.floor(r.getAttribute('x'))])")
    )
    assert [tuple(place) for place in drawn] == chosen
    visible = sum(len(blocks) for blocks in episode.steps[:step])
    assert part(page, "scores").locator("text.number").count() == visible
    text = part(page, "status").inner_text()
    assert f"{visible} of 16 blocks visible" in text
    assert text.startswith(f"Step {step + 1} of {total}" if step < total else f"Complete after {total} steps")
    assert part(page, "count").inner_text() == f"{step} / {total}"
    assert float(part(page, "curve").locator("text.value").text_content()) == pytest.approx(
        episode.loss[step], rel=5e-3
    )


def test_it_loads_and_starts_with_the_learned_planner(page: Page) -> None:
    assert part(page, "policy").locator("option:checked").inner_text() == "bc_utility"
    marks(page, policy=4, image=0, step=5)


@pytest.mark.parametrize("step", [0, 1, 9, 16])
def test_slider_moves_through_the_reveal(page: Page, step: int) -> None:
    move_slider(page, step)
    marks(page, policy=4, image=0, step=step)


def test_arrow_keys_move_from_the_slider_and_from_the_button(page: Page) -> None:
    move_slider(page, 3)
    part(page, "step").press("ArrowRight")
    marks(page, 4, 0, 4)
    part(page, "play").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    marks(page, 4, 0, 2)


def test_play_runs_to_the_end_and_can_be_paused(page: Page) -> None:
    move_slider(page, 13)
    part(page, "play").click()
    assert part(page, "play").inner_text() == "Pause"
    playwright.expect(part(page, "step")).to_have_value("16")
    assert part(page, "play").inner_text() == "Play"
    part(page, "play").click()  # from the start again
    playwright.expect(part(page, "step")).to_have_value("1")
    part(page, "play").click()
    marks(page, 4, 0, int(part(page, "step").input_value()))


def test_image_and_policy_can_be_chosen(page: Page) -> None:
    move_slider(page, 8)
    page.locator("input[name=image]").nth(2).check()
    marks(page, policy=4, image=2, step=8)
    part(page, "policy").select_option(label="random@4")
    marks(page, policy=2, image=2, step=2)  # as many visible blocks, in steps of four
    part(page, "policy").select_option(label="raster")
    marks(page, policy=0, image=2, step=8)
    part(page, "policy").press("Tab")
    assert page.evaluate("document.activeElement.dataset.part") == "play"


def test_scores_are_coloured_from_low_to_high_or_said_to_be_missing(page: Page) -> None:
    move_slider(page, 0)
    fills = (
        part(page, "scores")
        .locator("rect:not(.halo, .chosen)")
        .evaluate_all("all => all.map(r => r.getAttribute('fill'))")
    )
    scores = details()[4].episodes[0].scores
    assert scores is not None
    low, high = ("#" + bytes(colour).hex() for colour in colour_pixels(np.array([0.0, 1.0])))
    assert fills[int(scores[0].argmax())] == high and fills[int(scores[0].argmin())] == low
    assert part(page, "scale").is_visible()
    part(page, "policy").select_option(label="random")
    assert "gives no scores" in part(page, "legend").inner_text()
    assert not part(page, "scale").is_visible()


@pytest.mark.parametrize("with_keyboard", [False, True])
def test_table_sorts_both_ways_and_keeps_empty_cells_last(page: Page, with_keyboard: bool) -> None:
    table = page.locator("table.results.sortable")

    def order() -> list[str]:
        names: list[str] = table.locator("tbody th").all_inner_texts()
        return names

    def sort(header: str) -> Any:
        button = page.get_by_role("button", name=header)
        if with_keyboard:
            button.focus()
            page.keyboard.press("Enter")
        else:
            button.click()
        return table.locator("thead th", has=button)

    header = sort("gain AUC")
    assert header.get_attribute("aria-sort") == "descending"  # best first
    assert order() == ["oracle", "bc_utility", "random", "raster", "random@4", "real images"]
    sort("gain AUC")
    assert header.get_attribute("aria-sort") == "ascending"
    assert order() == ["random@4", "raster", "random", "bc_utility", "oracle", "real images"]
    assert sort("decode NLL").get_attribute("aria-sort") == "ascending"
    assert order()[:2] == ["oracle", "raster"] and order()[-1] == "real images"
    assert header.get_attribute("aria-sort") is None
    sort("policy")
    assert order() == sorted(order())


def test_few_tab_stops_lead_to_the_viewer_and_arrow_keys_move_among_headers(page: Page) -> None:
    table = page.locator("table.results.sortable")
    stops = 0
    while page.evaluate("document.activeElement.name") != "image":
        page.keyboard.press("Tab")
        stops += 1
        assert stops <= 15
    table.get_by_role("button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert table.locator("thead tr").last.locator("th").nth(1).get_attribute("aria-sort")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.innerText") == "policy"


def test_the_table_shows_its_main_columns_first_and_can_be_closed(page: Page) -> None:
    table = page.locator("table.results.sortable")
    headers = table.locator("thead tr").last.locator("th:visible")
    few = headers.count()
    page.get_by_label("columns").check()
    assert headers.count() == len(table.locator("tbody tr").first.locator("th, td").all()) > few > 2
    spans = table.locator("thead tr").first.locator("th:visible").evaluate_all("all => all.map(cell => cell.colSpan)")
    assert sum(spans) == headers.count()
    page.get_by_label("columns").uncheck()
    spans = table.locator("thead tr").first.locator("th:visible").evaluate_all("all => all.map(cell => cell.colSpan)")
    assert sum(spans) == headers.count() == few
    page.get_by_text("Table of 6 rows").click()
    assert table.is_hidden()


@pytest.mark.parametrize(
    "watched",
    [{"viewport": {"width": 360, "height": 740}}, {"viewport": {"width": 820, "height": 740}}],
    indirect=True,
    ids=["phone", "tablet"],
)
def test_nothing_overflows(page: Page) -> None:
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        """width => [...document.querySelectorAll("body *")].filter(element =>
            element.getBoundingClientRect().right > width + 1 && !element.closest(".scroll, svg")
        ).map(element => element.outerHTML.slice(0, 80))""",
        width,
    )
    assert wide == []
    page.get_by_label("columns").check()
    table = page.locator(".scroll").first
    assert table.evaluate("element => element.scrollWidth > element.clientWidth")  # the table scrolls by itself
    move_slider(page, 7)
    marks(page, 4, 0, 7)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_colour_schemes(browser: Any, address: str, scheme: str) -> None:
    watched = Watched(browser, address, color_scheme=scheme)
    colours = watched.page.evaluate(
        """() => [".summary", "figcaption", "nav a", "tbody td", ".learned td", "thead button", ".status"].map(name => {
            const element = document.querySelector(name);
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [name, getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        })"""
    )
    watched.context.close()
    for name, ink, ground in colours:
        assert contrast(ink, ground) >= 4.5, (name, ink, ground)  # WCAG 2 AA


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two CSS colours, rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_print_shows_every_figure_and_no_controls(page: Page) -> None:
    page.emulate_media(media="print")
    assert page.locator(".controls").is_hidden() and page.locator("nav").is_hidden()
    assert page.locator("table.results.sortable").is_hidden()
    for figure in page.locator("figure").all():
        assert figure.is_visible()
    groups = page.locator(".paper table")
    assert groups.count() == 5 and groups.first.is_visible()
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


@pytest.mark.parametrize("watched", [{"java_script_enabled": True, "reduced_motion": "reduce"}], indirect=True)
def test_everything_is_labelled(page: Page) -> None:
    unlabelled = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button")].filter(element =>
            !(element.labels?.length || element.ariaLabel || element.textContent.trim())
        ).map(element => element.outerHTML)"""
    )
    assert unlabelled == []


def test_without_scripts_the_page_says_so(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.get_by_text("The viewer needs JavaScript").is_visible()
    assert page.locator("table.results").first.is_visible()
    context.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_of_several_runs_sorts_fits_and_asks_nothing_of_the_network(
    browser: Any, tmp_path: Path, width: int
) -> None:
    rows = [row | {"run": "before, after" if row["policy"] == "raster" else "after"} for row in RESULTS["rows"]]
    results = {"summary": "Runs.", "runs": {}, "rows": rows, "comparisons": RESULTS["comparisons"]}
    path = write_runs_page(tmp_path / "comparison.html", results, RESULTS["protocol"])
    context = browser.new_context(viewport={"width": width, "height": 740})
    page, errors, requests = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    table = page.locator("table.results.sortable")
    assert table.locator("thead tr").last.locator("th").all_inner_texts()[:2] == ["policy", "run"]
    table.get_by_role("button", name="gain AUC").click()
    assert table.locator("tbody th").all_inner_texts()[:3] == ["oracle", "bc_utility", "random"]
    table.get_by_role("button", name="run", exact=True).click()
    assert table.locator("tbody tr").last.locator("th").inner_text() == "raster"
    differences = page.get_by_role("region", name="Paired comparisons").locator("tbody")
    page.get_by_role("button", name="mean difference").click()
    assert "raster" in differences.locator("tr").first.inner_text()  # +0.025, before -0.1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
    assert errors == [] and [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
