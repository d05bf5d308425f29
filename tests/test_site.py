"""The built site in a browser: every page as wide as on a desk and on a phone, its links, pictures, search and clicks.

    sphinx-build -W -n docs build/site  # as README.md says
    pip install playwright              # and Debian's chromium

Skipped where one of them is not there.
"""

import functools
import http.server
import re
import shutil
import threading
import urllib.parse
from pathlib import Path

import pytest

SITE = Path(__file__).parent.parent / "build/site"
PAGES = sorted(
    path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(not PAGES or not CHROMIUM, reason="no site in build/site, or no chromium")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """Of a server of the files, for a search reads its index as a page on the web does."""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address):
    """A tab that notes what goes wrong, and what is asked of anybody else."""
    context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.troubles = []
    tab.on("console", lambda line: line.type in ("error", "warning") and tab.troubles.append(line.text))
    tab.on("pageerror", lambda error: tab.troubles.append(str(error)))
    tab.on("response", lambda response: response.status < 400 or tab.troubles.append(response.url))
    tab.on(
        "request",
        lambda request: request.url.startswith((address, "data:")) or tab.troubles.append(request.url),
    )
    yield tab
    context.close()
    assert not tab.troubles


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page(tab, width, scheme):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    for page in PAGES:
        tab.goto(page)
        for image in tab.locator("img:visible").all():
            image.scroll_into_view_if_needed()
            assert image.evaluate("x => x.complete && x.naturalWidth > 0"), (page, image.get_attribute("src"))
        assert tab.evaluate("document.scrollingElement.scrollWidth") <= width, (
            f"{page} is wider than its window"
        )
        shade = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", shade)[:3])) > 380) == (scheme == "light"), (page, shade)
        assert not tab.troubles, page


def test_links_lead_somewhere():
    """Of the files: each page that is named is there, and so is the place on it."""
    texts = {page: (SITE / page).read_text() for page in PAGES}
    places = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    dead = []
    for page, text in texts.items():
        for link in re.findall(r'<a\b[^>]*?\bhref="([^"]+)"', text):
            url = urllib.parse.urlsplit(urllib.parse.urljoin(page, link.replace("&amp;", "&")))
            if url.scheme or url.netloc:
                continue
            path, place = urllib.parse.unquote(url.path), urllib.parse.unquote(url.fragment)
            if not (SITE / path).is_file() or (place and path in places and place not in places[path]):
                dead.append((page, link))
    assert not dead


def test_search(tab):
    tab.goto("search.html?q=ignore_index")
    tab.locator("#search-results li").first.wait_for()
    tab.get_by_role("link", name="softmax_cross_entropy", exact=True).wait_for()


@pytest.mark.parametrize("width", [1280, 390])
def test_decision(tab, width):
    """One question at a time, from what a row is to the page of a call."""
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto("which_loss.html")
    assert tab.locator("article h2:visible").all_inner_texts() == ["What is one row?"]
    for choice, title in (
        ("One of V classes is right", "One of V classes"),
        (
            "I have the right class of each row",
            "Class indices",
        ),
    ):
        tab.get_by_role("link", name=choice).click()
        assert tab.locator("article h2:visible").all_inner_texts() == [title]
    assert tab.get_by_text("jaxent.softmax_cross_entropy(logits, labels").is_visible()
    tab.locator("article").get_by_role("link", name="All options").locator("visible=true").click()
    assert tab.url.endswith("api/jaxent.softmax_cross_entropy.html")


def test_every_way_through_the_decision_ends_in_a_call(tab):
    """By clicks: all sections are reached, and what asks nothing more has code and the page of its function."""
    tab.goto("which_loss.html")
    start = tab.locator("article section section").first.get_attribute("id")
    ways, seen = [[start]], {start}
    while ways:
        way = ways.pop()
        tab.goto("which_loss.html")
        for place in way[1:]:
            tab.locator(f'article a.reference[href="#{place}"]:visible').first.click()
        assert tab.locator("article section section:visible").get_attribute("id") == way[-1]
        links = [link.get_attribute("href") for link in tab.locator("article a.reference:visible").all()]
        onward = {link[1:] for link in links if link.startswith("#")} - {start}
        code = tab.locator("article .highlight:visible").all_inner_texts()
        assert onward or code, way
        if code:
            assert any("jaxent." in text for text in code), way
            assert any(link.startswith("api/jaxent.") for link in links), way
        ways += [[*way, place] for place in sorted(onward - seen)]
        seen |= onward
    tab.goto("which_loss.html")
    assert seen == {x.get_attribute("id") for x in tab.locator("article section section").all()}


def test_from_torch_in_two_clicks(tab):
    """cross_entropy(weight=w, label_smoothing=0.1), whose ignore_index is -100: the call, and its page."""
    tab.goto("index.html")
    tab.locator("article").get_by_role("link", name="PyTorch").click()
    row = tab.get_by_role("row").filter(has_text="cross_entropy(z, u, weight=w, label_smoothing=0.1)")
    call = row.get_by_role("link").inner_text()
    assert all(option in call for option in ("class_weights=w", "ignore_index=-100", "label_smoothing=0.1"))
    row.get_by_role("link").click()
    assert tab.get_by_role("heading", name="softmax_cross_entropy").is_visible()
