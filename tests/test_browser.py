"""The pages as a browser shows them; skipped without Playwright, and failing where it has no Chromium."""
import re
import shutil
import time

import pytest

import test_gallery
import test_report
from test_gallery import large  # a fixture
from test_report import report, study  # fixtures

__all__ = ['large', 'report', 'study']
playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed')
WIDTHS = (390, 1280, 1920)


@pytest.fixture(scope='module')
def chromium():
    system = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=system)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    "Opens a page of the disk; afterwards nothing may have been said on the console or asked of the network."
    said, asked, contexts = [], [], []
    def open_page(path, width=1280, **options):
        contexts.append(chromium.new_context(viewport=dict(width=width, height=900), **options))
        page = contexts[-1].new_page()
        page.on('console', lambda message: said.append(message.text) if message.type == 'error' else None)
        page.on('pageerror', lambda error: said.append(str(error)))
        page.on('dialog', lambda dialog: (said.append(f'dialog {dialog.message}'), dialog.dismiss()))
        page.on('request', lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page
    yield open_page
    for context in contexts: context.close()
    assert not said and all(url.startswith(('file:', 'data:')) for url in asked)


@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_report_fits_the_screen(visit, report, width, scheme):
    page = visit(report/'index.html', width, color_scheme=scheme)
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.locator('#overview img').first.evaluate('image => image.naturalWidth') > 0


def test_a_report_shows_tricks_as_text(visit, report):
    page = visit(report/'index.html')
    assert test_report.TRICK in page.inner_text('.claim')
    assert page.locator('img[src="x"]').count() == 0


def test_a_command_is_copied_with_the_keyboard(visit, report):
    page = visit(report/'index.html')
    button = page.locator('button.copy').first
    button.focus()
    page.keyboard.press('Enter')
    page.wait_for_function('document.querySelector("button.copy").textContent !== "Copy"')
    assert button.text_content() in ('Copied', 'Selected: press Ctrl-C')


def test_print_unfolds(visit, report):
    page = visit(report/'index.html')
    page.evaluate('dispatchEvent(new Event("beforeprint"))')
    assert page.locator('details:not([open])').count() == 0
    page.evaluate('dispatchEvent(new Event("afterprint"))')
    assert page.locator('details:not([open])').count() > 0


def test_a_gallery_filters_sorts_and_searches(visit, large):
    page = visit(large/'index.html')
    page.wait_for_selector('article')
    assert page.inner_text('article h2 >> nth=0') == test_gallery.TRICK.strip()
    page.fill('#words', 'RSS1499')
    page.wait_for_function('document.querySelector("#count").textContent.startsWith("1 of")')
    page.fill('#words', '')
    page.wait_for_function('document.querySelector("#count").textContent.startsWith("1500 of")')
    page.select_option('#only', 'improved')
    assert page.input_value('#other') == '1'
    improved = int(page.inner_text('#count').split()[0])
    page.select_option('#only', 'worsened')
    assert improved + int(page.inner_text('#count').split()[0]) <= 1500
    page.select_option('#only', 'all')
    page.select_option('#set', index=2)
    page.wait_for_function('document.querySelector("article .soft").textContent.startsWith("TW")')


def test_a_gallery_shows_scores_with_what_they_are(visit, large):
    page = visit(large/'index.html')
    page.wait_for_selector('article')
    page.select_option('#other', '1')
    scored, bare = page.locator('article >> nth=0').locator('h3').all_inner_texts()
    assert scored == 'run 0 · score: log dual softmax' and bare == 'run 1 · no scores kept'
    with_scores, without = page.locator('article >> nth=0').locator('ol').all()
    first = with_scores.locator('li:not(.own)').all_inner_texts()
    assert {re.search(r'(\d+)\..*?(\(.*\))?$', one.replace('\n', ' ')).groups() for one in first} <= {
        (f'{k + 1}', f'({-14.625 - k/100:g})') for k in range(10)} and len(first) >= 9
    assert not any('(' in one for one in without.locator('li').all_inner_texts())


def test_a_gallery_draws_as_it_is_scrolled(visit, large):
    page = visit(large/'index.html')
    page.wait_for_selector('article')
    before = page.locator('article').count()
    page.mouse.wheel(0, 100_000)
    page.wait_for_function(f'document.querySelectorAll("article").length > {before}')
    assert before < 100


def test_a_gallery_is_seen_soon(visit, large):
    began = time.perf_counter()
    visit(large/'index.html').wait_for_selector('article img')
    assert time.perf_counter() - began < 2*5  # 2 s on an idle machine


@pytest.mark.parametrize('width', WIDTHS)
def test_a_gallery_fits_the_screen(visit, large, width):
    page = visit(large/'index.html', width)
    page.wait_for_selector('article')
    assert page.evaluate('document.documentElement.scrollWidth') <= width
