"""The documentation site, opened page by page in headless Chromium; `nox -s browser`.

Every page at desktop and phone width, in the light and the dark scheme. Screenshots go to
`build/browser`. What the checks find is told for the whole page at once.
"""

import functools
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("LOSSARGS_SITE", ROOT / "build" / "site"))
PICTURES = ROOT / "build" / "browser"
BASE = "/lossargs/"  # the path of `site_url`
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
SCHEMES = ("light", "dark")
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

# The least contrast of text with what is behind it (WCAG 2, relative luminance), and whose it is.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true})
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1)
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data
    return [r, g, b, a / 255]
  }
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]))
  const behind = element => {
    if (!element) return [255, 255, 255]
    const own = rgba(getComputedStyle(element).backgroundColor)
    return own[3] === 1 ? own.slice(0, 3) : over(own, behind(element.parentElement))
  }
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    return .2126 * r + .7152 * g + .0722 * b
  }
  let worst = [21, ""]
  for (const element of document.querySelectorAll(".md-content :is(p, li, td, th, h1, h2, h3, code, a)")) {
    if (!element.textContent.trim() || !element.offsetParent || element.matches(".headerlink")) continue
    const back = behind(element)
    const levels = [light(over(rgba(getComputedStyle(element).color), back)), light(back)].sort((a, b) => b - a)
    const ratio = (levels[0] + .05) / (levels[1] + .05)
    if (ratio < worst[0]) worst = [ratio, element.tagName + ": " + element.textContent.trim().slice(0, 50)]
  }
  return worst
}"""
PARTS = """() => ({
  links: [...document.querySelectorAll("[href], [src]")].map(e => e.href?.baseVal ?? e.href ?? e.src),
  anchors: [...document.querySelectorAll("[id], a[name]")].map(e => e.id || e.name),
  broken: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
  width: [document.documentElement.scrollWidth, window.innerWidth],
})"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site under its base path, and nothing elsewhere."""

    def translate_path(self, path: str) -> str:
        inside = path.startswith(BASE)
        return super().translate_path("/" + path.removeprefix(BASE) if inside else "/no/such/file")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def home():
    handler = functools.partial(Handler, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{BASE}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=[*QUIET])
        yield chromium
        chromium.close()


def opened(browser: Browser, home: str, size="desktop", scheme="light") -> tuple[Page, list[str]]:
    """A page to open addresses in, and what goes wrong in it."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme,
        permissions=["clipboard-read", "clipboard-write"],
    )  # fmt: skip
    page, faults = context.new_page(), []
    host = urlsplit(home).netloc

    def requested(request):
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.netloc != host:
            faults.append(f"asks another host: {request.url}")

    def answered(response):
        if response.status >= 400 and not response.url.endswith("/404.html"):
            faults.append(f"{response.status}: {response.url}")

    page.on("request", requested)
    page.on("response", answered)
    page.on("requestfailed", lambda request: faults.append(f"failed: {request.url}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("console", lambda m: m.type == "error" and faults.append(f"console: {m.text}"))
    return page, faults


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAGES)
def test_page(browser, home, name, size, scheme):
    page, faults = opened(browser, home, size, scheme)
    page.goto(home + name.removesuffix("index.html"), wait_until="networkidle")
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    parts = page.evaluate(PARTS)
    contrast, where = page.evaluate(CONTRAST)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    picture = name.removesuffix(".html").removesuffix("/index").replace("/", "-")
    page.screenshot(path=PICTURES / f"{picture}-{size}-{scheme}.png", full_page=True)
    page.context.close()
    faults += [f"no picture: {source}" for source in parts["broken"]]
    if parts["width"][0] > parts["width"][1]:
        faults.append(f"scrolls sideways: {parts['width'][0]} of {parts['width'][1]} pixels")
    if contrast < 4.5:
        faults.append(f"contrast {contrast:.1f}: {where}")
    if (background == "rgb(255, 255, 255)") != (scheme == "light"):
        faults.append(f"not the {scheme} scheme: {background}")
    assert faults == []


def test_links(browser, home):
    """From the home page every page is reached, and each link leads somewhere."""
    page, _ = opened(browser, home)
    anchors, links, pending, faults = {}, set(), [home], []
    while pending:
        address = pending.pop()
        if address in anchors:
            continue
        response = page.goto(address, wait_until="domcontentloaded")
        parts = page.evaluate(PARTS)
        anchors[address] = set(parts["anchors"]) if response.ok else None
        for link in parts["links"]:
            target = urljoin(address, link)
            links.add((address, target))
            plain = urldefrag(target).url
            if plain.startswith(home) and (plain.endswith(("/", ".html"))):
                pending.append(plain)
    for address, target in sorted(links):
        plain, fragment = urldefrag(target)
        if not plain.startswith(home):
            # What the site says of its own place (canonical, sitemap) is https as well.
            if urlsplit(target).scheme not in ("https", "mailto", "data"):
                faults.append(f"{address} -> {target}: neither of this site nor https")
        elif plain in anchors:
            if anchors[plain] is None or (fragment and fragment not in anchors[plain]):
                faults.append(f"{address} -> {target}")
        elif not page.request.get(plain).ok:
            faults.append(f"{address} -> {target}")
    page.context.close()
    reached = {address.removeprefix(home) for address in anchors}
    alone = {n.removesuffix("index.html") for n in PAGES} - reached - {"404.html"}
    assert (sorted(set(faults)), alone) == ([], set())


@pytest.mark.parametrize("size", SIZES)
def test_search(browser, home, size):
    page, faults = opened(browser, home, size)
    page.goto(home, wait_until="networkidle")
    if size == "phone":
        page.locator("label.md-header__button[for=__search]").click()
    page.locator("input.md-search__input").click()
    page.keyboard.type("with_args", delay=20)
    results = page.locator("a.md-search-result__link")
    results.first.wait_for()
    page.screenshot(path=PICTURES / f"search-{size}.png")
    addresses = [results.nth(i).get_attribute("href") for i in range(results.count())]
    assert any("/reference/" in address for address in addresses), addresses
    results.first.click()
    page.wait_for_url(lambda address: address.split("?")[0] != home)
    assert "with_args" in page.locator(".md-content").inner_text()
    assert faults == []
    page.context.close()


@pytest.mark.parametrize("name", ["", "start/"])
def test_code_is_copied(browser, home, name):
    page, faults = opened(browser, home)
    page.goto(home + name, wait_until="networkidle")
    block = page.locator("pre:has(> code)").first
    block.hover()
    block.locator("xpath=ancestor::div[contains(@class, 'highlight')]").first.locator(
        "button[data-md-type=copy], button.md-clipboard"
    ).first.click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).length > 0")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == block.locator("code").text_content().strip()
    assert faults == []
    page.context.close()


def test_the_palette_toggle(browser, home):
    page, faults = opened(browser, home)
    page.goto(home, wait_until="networkidle")
    seen = []
    for _ in range(3):
        page.locator("form[data-md-component=palette] label:not([hidden])").click()
        page.wait_for_timeout(100)
        seen.append(page.locator("body").get_attribute("data-md-color-scheme"))
    assert set(seen) == {"default", "slate"}
    assert faults == []
    page.context.close()
