"""The rendered site in a real browser: nothing from outside, nothing broken, and it works as a reader expects.

The site is built from this checkout's notebooks, with outputs where the pipeline has left them, so the test also runs on a fresh clone.
"""
import functools
import http.server
import threading
import warnings
from pathlib import Path

import pytest

from moe_lab.doctor import find_chromium
from moe_lab.site import build_site

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
DECODE = """async () => { const broken = [];
  for (const image of document.images) { image.loading = 'eager'; try { await image.decode() } catch { broken.push(image.src) } }
  return broken }"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build_site(tmp_path_factory.mktemp("rendered") / "site", ROOT, quiet=True)


@pytest.fixture(scope="module")
def addresses(site):
    """The site's address on a web server and on a disk."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site.out)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"http": f"http://127.0.0.1:{server.server_port}", "file": site.out.resolve().as_uri()}
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    program = find_chromium()
    if program is None:
        message = "NO CHROMIUM FOUND: the site was NOT tested in a browser; install Debian's `chromium` and run again"
        warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, addresses):
    """Opens pages; afterwards nothing may have been asked of another host, and no error may have been logged."""
    opened, outside, errors = [], [], []

    def open_page(scheme, name, **options):
        context = browser.new_context(**options)
        opened.append(context)
        base = addresses[scheme]
        context.on("request", lambda r: outside.append(r.url) if not r.url.startswith((base, "data:", "blob:")) else None)
        tab = context.new_page()
        tab.on("console", lambda m: errors.append(f"{name}: {m.text}") if m.type == "error" else None)
        tab.on("pageerror", lambda e: errors.append(f"{name}: {e}"))
        tab.goto(f"{base}/{name}")
        return tab

    yield open_page
    for context in opened: context.close()
    assert outside == []
    assert errors == []


def test_every_promise_holds_in_the_files(site):
    assert site.problems == []


def test_nothing_names_this_machine(site):
    named = [p.name for p in site.out.rglob("*") if p.suffix in (".html", ".js", ".css") and str(ROOT) in p.read_text(encoding="utf-8")]
    assert named == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_every_page_opens_and_every_image_decodes(site, visit, scheme):
    "Images are the same bytes either way: they are decoded once."
    tab = visit(scheme, "index.html")
    base = tab.url.removesuffix("index.html")
    for page in sorted(site.out.rglob("*.html")):
        tab.goto(base + page.relative_to(site.out).as_posix(), wait_until="load" if scheme == "file" else "domcontentloaded")
        assert tab.title(), page
        assert scheme == "http" or tab.evaluate(DECODE) == [], page


def test_index_lists_every_notebook(site, visit):
    tab = visit("http", "index.html")
    linked = set(tab.eval_on_selector_all("article a", "links => links.map(a => a.getAttribute('href'))"))
    assert {f"{page.slug}.html" for page in site.pages} <= linked


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_search_finds_words_of_the_notebooks(visit, scheme):
    tab = visit(scheme, "index.html")
    tab.click("button.search-button__button >> visible=true")
    tab.keyboard.type("mosaic", delay=20)
    tab.wait_for_selector("dialog ul.search a")
    assert any("augment" in (link.get_attribute("href") or "") for link in tab.query_selector_all("dialog ul.search a"))
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#search-results >> text=Search finished")  # until then the list moves, and a click may miss
    with tab.expect_navigation():
        tab.click("#search-results ul.search a >> nth=0")
    assert "mosaic" in tab.inner_text("article").lower()


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_theme_switches_and_stays(visit, scheme):
    tab = visit(scheme, "index.html", color_scheme="light")
    look = lambda: tab.evaluate("[document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor]")
    light = look()
    tab.click("button.theme-switch-button >> visible=true")
    tab.click("button[data-mode=dark] >> visible=true")
    dark = look()
    assert light[0] == "light" and dark[0] == "dark" and light[1] != dark[1]
    tab.wait_for_timeout(2000)  # Chromium stores for a page in another process, a moment later
    tab.reload()
    assert look() == dark


def test_auto_mode_follows_the_system(visit):
    assert visit("http", "index.html", color_scheme="dark").evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_phone_needs_no_sideways_scrolling(site, visit):
    tab = visit("http", "index.html", viewport={"width": 390, "height": 800})
    base = tab.url.removesuffix("index.html")
    one_each = {page.section: f"{page.slug}.html" for page in site.pages}
    for name in ["index.html", *one_each.values()]:
        tab.goto(base + name)
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name


def test_code_of_answers_is_folded_and_unfolds(site, visit):
    answers = [page for page in site.pages if page.section == "questions"]
    tab = visit("http", f"{answers[0].slug}.html")
    assert not tab.is_visible("details.hide pre >> nth=0")
    tab.click("details.hide summary >> nth=0")
    assert tab.is_visible("details.hide pre >> nth=0")
