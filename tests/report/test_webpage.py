"""Check the results page in a browser: it contains every record, fetches nothing, and works by keyboard and on a phone."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.report.collect import collect, read_results
from sparseinst.report.pages import write_report
from sparseinst.report.webpage import web_page
from tests.records import write_records

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def write_page(folder: Path) -> Path:
    """Write the page of made-up records with its plots, and return its path."""
    store = write_records(folder, "mini")
    # Without escaping, the name of this peer would end the script.
    store.write(
        Record("peer", "peer-evil", {"peer": "</script><b>", "short_side": 1, "figures": {}}, provenance={"profile": "x"})
    )
    results = read_results(["all"], "mini", folder)
    write_report(results, folder, page=results)
    return folder / "mini.html"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with contextlib.chdir(ROOT):
        yield write_page(tmp_path_factory.mktemp("page") / "results")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    """Open the page in an offline browser. Every console message, error and request fails the test."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else complaints.append(asked.url))
    opened.goto(page_file.as_uri())
    yield opened
    assert complaints == []
    context.close()


def test_the_page_contains_every_record_and_fetches_nothing(page_file: Path) -> None:
    text = page_file.read_text()
    records = list((page_file.parent / "records").glob("*.json"))
    assert len(records) > 50
    for record in records:
        assert f'data-keys="{record.stem}"' in text, record.stem
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "</script><b>" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))  # type: ignore[union-attr]
    assert data["peer-evil"]["result"]["peer"] == "</script><b>"


def test_missing_values_are_named(tmp_path: Path) -> None:
    store, profile, [table] = Store(tmp_path), read_profile("mini", EXPERIMENTS), read_tables(["table5"], EXPERIMENTS)
    text = web_page([collect(table, profile, store, {}, {}, set())], store, tmp_path)
    assert "Table 5: BCE alone (pending)" in text
    assert '<span class="chip gap">pending</span>' in text


def column(page: Any, heading: str) -> list[str]:
    """Return the texts of a column of Table 5, from top to bottom."""
    headings = page.locator("#table5 th").all_inner_texts()
    index = next(number for number, text in enumerate(headings, 1) if text.split(" ")[0] == heading)
    texts: list[str] = page.locator(f"#table5 tbody tr > :nth-child({index})").all_inner_texts()
    return texts


def test_a_click_on_a_heading_sorts_the_table(page: Any) -> None:
    assert [text.split(" ")[0] for text in column(page, "AP")] == ["19.7", "3.9", "29.5", "33.5"]
    button = page.locator("#table5 th button", has_text=re.compile("^AP$"))
    button.click()
    assert [text.split(" ")[0] for text in column(page, "AP")] == ["3.9", "19.7", "29.5", "33.5"], (
        "sorted as numbers, not as text"
    )
    button.click()
    assert [text.split(" ")[0] for text in column(page, "AP")] == ["33.5", "29.5", "19.7", "3.9"]
    assert page.locator("#table5 th[aria-sort=descending]").count() == 1


def test_details_open_and_close_by_keyboard(page: Any) -> None:
    """Enter on a row's button opens the details. Escape closes them and returns the focus to the button."""
    button = page.locator("#table5 button.details").first
    button.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    text = dialog.inner_text()
    assert "Table 5: BCE alone" in text
    for part in ("loss.dice", "evaluate", "resampled", "commit", "AMD EPYC"):
        assert part in text
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert button.evaluate("element => element === document.activeElement")


def test_the_filter_shows_only_matching_records(page: Any) -> None:
    page.locator("#filter").fill("cross-attention")
    shown = page.locator("#all-records tbody tr:visible").all_inner_texts()
    assert 0 < len(shown) < 20
    assert all("cross-attention" in text for text in shown)
    assert page.locator("#shown").inner_text() == f"{len(shown)} shown"


@pytest.mark.parametrize("width", [320, 390])
def test_the_page_fits_on_a_phone(page: Any, width: int) -> None:
    """The page is no wider than the screen. A table scrolls on its own, and its first column stays visible."""
    page.set_viewport_size({"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    scroll = page.locator("#table5 .scroll")
    assert scroll.evaluate("element => element.scrollWidth <= element.clientWidth"), "each row is a card"
    assert page.locator("#table5 figure img").evaluate("image => image.naturalWidth > 0 && image.complete")
    verdict = page.locator("#table5 td[data-title=verdict]").first
    assert verdict.is_visible()
    assert verdict.bounding_box()["x"] + verdict.bounding_box()["width"] <= width


def test_verdicts_are_visible_without_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 1280, "height": 800})
    for table in ("table2", "table3", "table4", "table5", "table6", "table7"):
        box = page.locator(f"#{table} td[data-title=verdict]").first.bounding_box()
        assert box["x"] + box["width"] <= 1280, table
