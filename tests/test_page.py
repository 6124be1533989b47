"""The built-in page: its files over HTTP, and what it does in a real browser.

The browser is Chromium as the system has it, driven by playwright; without either, tests that need
them are skipped.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from gptoss.tokenizer import Tokenizer
from harmony_text import final, last_message, thought, tokens_of
from server_tools import Live, exchange, live, scripted, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

KEY = "a-key-of-some-length"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

INJECTION = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">

<svg onload="window.hacked = 3"><b>bold?</b>

[click](javascript:window.hacked=4) `<i>code</i>` **<u>strong</u>**

| <s>a</s> | b |
|---|---|
| <iframe src="/"></iframe> | [x](data:text/html,<script>1</script>) |

```html"><img src=x onerror=1>
</code></pre><script>window.hacked = 5</script>
```
"""

WIDE = f"""{"endless" * 60}

| {" | ".join(["a column of a table"] * 12)} |
|{"---|" * 12}
| {" | ".join(["1234567890"] * 12)} |

```
{"code " * 80}
```

`{"code" * 100}` and [{"link" * 60}](https://example.org/{"path" * 60})
"""

ANSWERS = {
    "bridge": thought("They want *facts*.") + final("It **hangs** on:\n\n- cables\n- towers"),
    "inject": thought("<img src=x onerror='window.hacked = 6'>") + final(INJECTION),
    "wide": thought("wide" * 200) + final(WIDE),
    "endless": thought("Hm.") + final("word " * 3000),
}


def test_files() -> None:
    """The page and all it refers to are there, and nothing on it comes from elsewhere."""

    async def check(client: httpx.AsyncClient) -> None:
        page = await client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert not any("unsafe" in part or "http" in part or "*" in part for part in policy)
        assert not re.search(r"\son\w+=|\sstyle=|<style|https?://", page.text)
        assert not re.search(r"<script(?![^>]*\ssrc=)", page.text)
        files = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
        assert {"page/style.css", "page/conversation.css", "page/app.js", "page/theme.js"} <= files
        while files:
            name = files.pop()
            answer = await client.get(f"/{name}")
            assert answer.status_code == 200, name
            assert answer.headers["content-security-policy"] == "; ".join(policy)
            assert ("javascript" in answer.headers["content-type"]) == name.endswith(".js")
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", answer.text)
            files |= {f"page/{other}" for other in re.findall(r'from "\./(\S+)"', answer.text)}

    exchange(scripted().app, check)


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/..%2fapp.py", "/page/../app.py", "/page/__init__.py"]
)
def test_no_other_files(path: str) -> None:
    answer = exchange(scripted().app, lambda client: client.get(path))
    assert answer.status_code == 404
    assert "error" in answer.json()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tokenizer(harmony_path: Path) -> Tokenizer:
    return Tokenizer.from_file(harmony_path / "tokenizer.json")


@contextmanager
def serving(tokenizer: Tokenizer, seen: list[str] | None = None, **options: Any) -> Iterator[Live]:
    """A server whose model has an answer for some words; `seen` gets the prompts."""

    def script(prompt: list[int]) -> list[int]:
        if seen is not None:
            seen.append(tokenizer.decode(prompt))
        _, question = last_message(tokenizer, prompt)
        said = next((text for word, text in ANSWERS.items() if word in question), final("Yes."))
        return tokens_of(tokenizer, said)

    with live(scripted(script, tokenizer, **options)) as server:
        yield server


@contextmanager
def opened(browser: "Browser", server: Live, **options: Any) -> "Iterator[Page]":
    """The page of a server. Whatever goes wrong in its scripts fails the test."""
    context = browser.new_context(**options)
    context.set_default_timeout(20_000)
    try:
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        wait(page, "document.querySelector('#model').textContent")
        yield page
        assert not errors
    finally:
        context.close()


def wait(page: "Page", condition: str) -> None:
    """Until a JavaScript expression is true. (playwright's own way needs eval, which the page's
    policy does not allow.)"""
    until(lambda: page.evaluate(condition))


def ask(page: "Page", text: str, to_end: bool = True) -> None:
    page.fill("#message", text)
    page.keyboard.press("Enter")
    if to_end:
        page.wait_for_selector("#log > .answer:last-child[aria-busy=false]")


def test_chat(browser: "Browser", tokenizer: Tokenizer) -> None:
    """Two questions: text as it was meant, reasoning folded, the conversation sent along."""
    seen: list[str] = []
    with serving(tokenizer, seen) as server, opened(browser, server) as page:
        assert page.inner_text("#model") == "scripted"
        assert page.is_visible("#welcome") and page.is_disabled("#send")
        page.select_option("#effort", "high")
        ask(page, "What of a bridge?")
        assert page.inner_text(".bubble") == "What of a bridge?"
        assert page.inner_text(".text strong") == "hangs"
        assert page.locator(".text li").all_inner_texts() == ["cables", "towers"]
        assert not page.is_visible("#welcome")
        assert page.inner_text("summary").startswith("Thought for")
        assert not page.is_visible(".thoughts")
        page.click("summary")
        assert page.inner_text(".thoughts") == "They want *facts*."
        assert re.search(r"\d+ tokens\n", page.inner_text(".foot"))

        page.click("#open-settings")
        page.fill("#system", "Answer in verse.")
        page.keyboard.press("Escape")
        ask(page, "And then?")
        assert page.locator(".text").last.inner_text() == "Yes."
    assert "Reasoning: high" in seen[0] and "verse" not in seen[0]
    assert "It **hangs** on:" in seen[1] and "facts" not in seen[1]
    assert "Answer in verse." in seen[1] and "And then?" in seen[1]


def test_streams_and_stops(browser: "Browser", tokenizer: Tokenizer) -> None:
    """Text appears while the model writes; the stop button ends it here and in the engine."""
    with serving(tokenizer, delay=0.005) as server, opened(browser, server) as page:
        ask(page, "endless", to_end=False)
        wait(page, "document.querySelector('.text').innerText.length > 50")
        core = server.scripted.core
        assert core.sequences and not page.is_visible("#send")
        page.click("#stop")
        page.wait_for_selector(".foot:has-text('stopped')")
        until(lambda: not core.sequences)
        assert server.scripted.model.engine.stats().running == 0
        text = page.inner_text(".text")
        assert 50 < len(text) < 10_000
        assert page.inner_text("#status") == "Stopped"

        ask(page, "endless", to_end=False)  # by keyboard, too
        wait(page, "document.querySelectorAll('.text')[1].innerText.length > 50")
        page.keyboard.press("Escape")
        until(lambda: not core.sequences)
        assert page.locator(".text").first.inner_text() == text


def test_new_chat_while_streaming(browser: "Browser", tokenizer: Tokenizer) -> None:
    seen: list[str] = []
    with serving(tokenizer, seen, delay=0.005) as server, opened(browser, server) as page:
        ask(page, "endless", to_end=False)
        page.wait_for_selector(".text p")
        page.click("#new-chat")
        assert page.is_visible("#welcome")
        until(lambda: not server.scripted.core.sequences)
        ask(page, "bridge")
        assert page.locator("article").count() == 2
    assert "endless" not in seen[-1]


def test_again(browser: "Browser", tokenizer: Tokenizer) -> None:
    """An answer can be asked for once more: the conversation is the same."""
    seen: list[str] = []
    with serving(tokenizer, seen) as server, opened(browser, server) as page:
        ask(page, "bridge")
        page.click(".again")
        page.wait_for_selector(".again")
        until(lambda: server.scripted.model.engine.stats().running == 0)
        assert page.locator("article").count() == 2
        ask(page, "next")
    assert len(seen) == 3 and seen[0] == seen[1]
    assert seen[2].count("<|channel|>final") == 1


def test_injection(browser: "Browser", tokenizer: Tokenizer) -> None:
    """Markup in what a user or a model writes is text, in every place it can stand."""
    with serving(tokenizer) as server, opened(browser, server) as page:
        ask(page, "inject <img src=x onerror='window.hacked = 7'>")
        page.click("summary")
        inside = "document.querySelectorAll('#log :is(img, script, svg, iframe, b, i, u)').length"
        assert page.evaluate(inside) == 0
        assert page.evaluate("window.hacked") is None
        assert page.locator("#log .text a").count() == 0
        text = page.inner_text(".text")
        for part in ("<script>window.hacked = 1</script>", "onerror=", "[click](javascript:"):
            assert part in text
        assert page.inner_text(".thoughts").startswith("<img")
        assert page.inner_text(".bubble").endswith("7'>")
        # The policy would hold, too, if a script were to try.
        blocked = "try { document.createElement('p').innerHTML = '<b>'; 'no' } catch { 'yes' }"
        assert page.evaluate(blocked) == "yes"


def test_narrow(browser: "Browser", tokenizer: Tokenizer) -> None:
    """On a phone nothing but code and tables scrolls sideways."""
    view = {"width": 360, "height": 640}
    with serving(tokenizer) as server, opened(browser, server, viewport=view) as page:
        width = "document.documentElement.scrollWidth"
        assert page.evaluate(width) == 360
        ask(page, "wide" * 100)
        page.click("summary")
        assert page.evaluate(width) == 360
        assert page.evaluate("document.querySelector('main').scrollWidth") <= 360
        assert page.evaluate("document.querySelector('pre').scrollWidth") > 360
        for name in ("#send", "#new-chat", "#open-settings", "#theme"):
            box = page.locator(name).bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360
            assert box["width"] >= 32 and box["height"] >= 32, name
        page.click("#open-settings")
        box = page.locator("dialog").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_dark_and_light(browser: "Browser", tokenizer: Tokenizer) -> None:
    """The page follows the system until its button says otherwise, and remembers."""
    brightness = """() => {
        const [ground, ink] = ["backgroundColor", "color"].map((name) =>
            getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).map(Number));
        return [Math.max(...ground), Math.max(...ink)];
    }"""
    with serving(tokenizer) as server, opened(browser, server, color_scheme="dark") as page:
        ground, ink = page.evaluate(brightness)
        assert ground < 60 and ink > 200
        assert page.get_attribute("#theme", "aria-pressed") == "true"
        page.click("#theme")
        ground, ink = page.evaluate(brightness)
        assert ground > 200 and ink < 60
        page.reload()
        assert page.evaluate(brightness) == [ground, ink]
        page.click("#theme")
        page.emulate_media(color_scheme="light")  # the system's choice counts again
        wait(page, "document.querySelector('#theme').ariaPressed === 'false'")
        assert page.evaluate(brightness) == [ground, ink]


def test_errors(browser: "Browser", tokenizer: Tokenizer) -> None:
    """What the server refuses is told, and can be tried again."""
    with serving(tokenizer, max_context=256) as server, opened(browser, server) as page:
        ask(page, "word " * 400, to_end=False)
        page.wait_for_selector("[role=alert]")
        assert "max_context" in page.inner_text("[role=alert]")
        assert page.locator(".answer").count() == 0
        page.click("#new-chat")
        page.route("**/v1/chat/completions", lambda route: route.abort())
        ask(page, "bridge", to_end=False)
        page.wait_for_selector("[role=alert]:has-text('does not answer')")
        page.unroute("**/v1/chat/completions")
        page.click("[role=alert] button")
        page.wait_for_selector(".text strong")
        assert page.locator("[role=alert]").count() == 0


def test_another_model(browser: "Browser", tokenizer: Tokenizer) -> None:
    """A server that was started again with another model: the page takes it at the second try."""
    with serving(tokenizer) as server, opened(browser, server) as page:
        page.evaluate("document.querySelector('#model').textContent = 'of yesterday'")
        ask(page, "bridge", to_end=False)
        page.click("[role=alert] button")
        page.wait_for_selector(".text strong")
        assert page.inner_text("#model") == "scripted"


def test_failure_of_the_engine(browser: "Browser", tokenizer: Tokenizer) -> None:
    """An error in the middle of a stream keeps what came before it."""
    with serving(tokenizer, delay=0.005) as server, opened(browser, server) as page:
        ask(page, "endless", to_end=False)
        page.wait_for_selector(".text p")
        server.scripted.core.fail = RuntimeError("the core broke")
        page.wait_for_selector("[role=alert]")
        assert "core" not in page.inner_text("[role=alert]")
        assert page.inner_text(".text").startswith("word")
        assert "incomplete" in page.inner_text(".foot")


def test_key(browser: "Browser", tokenizer: Tokenizer) -> None:
    """The browser's own question for a password is enough; the page sends a key where it is not."""
    credentials = {"username": "anyone", "password": KEY}
    with (
        serving(tokenizer, settings={"api_key": KEY}) as server,
        opened(browser, server, http_credentials=credentials) as page,
    ):
        ask(page, "bridge")
        assert page.inner_text(".text strong") == "hangs"

    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == f"Bearer {KEY}":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "An API key is needed."}})

    with serving(tokenizer) as server, opened(browser, server) as page:
        page.route("**/v1/**", guard)
        page.reload()
        page.wait_for_selector("dialog[open]")
        assert page.evaluate("document.activeElement.id") == "key"
        assert "asks for an API key" in page.inner_text("#key-note")
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog:not([open])", state="attached")
        wait(page, "document.querySelector('#model').textContent")
        ask(page, "bridge")
        assert page.evaluate("sessionStorage.getItem('gptoss.key')") == KEY
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_keyboard(browser: "Browser", tokenizer: Tokenizer) -> None:
    """Everything has a name and is reached by Tab; Shift Enter makes a line and sends nothing."""
    with serving(tokenizer) as server, opened(browser, server) as page:
        assert page.evaluate("document.activeElement.id") == "message"
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        assert page.input_value("#message") == "one\ntwo"
        page.keyboard.press("Enter")
        page.wait_for_selector(".foot")
        assert page.inner_text(".bubble") == "one\ntwo"
        names = page.evaluate(
            """[...document.querySelectorAll("button, input, textarea, select")].map((node) =>
                (node.ariaLabel || node.labels?.[0]?.textContent || node.textContent).trim())"""
        )
        assert len(names) > 8 and all(names)
        page.evaluate("document.activeElement.blur()")
        reached = set()
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate("document.activeElement.id || document.activeElement.className")
            )
        assert {"new-chat", "theme", "open-settings", "message", "effort", "small again"} <= reached


def test_follows_the_end(browser: "Browser", tokenizer: Tokenizer) -> None:
    """The view stays at the end of what streams, unless the reader scrolls away."""
    with serving(tokenizer, delay=0.001) as server, opened(browser, server) as page:
        ask(page, "endless", to_end=False)
        end = """(({scrollHeight, scrollTop, clientHeight}) =>
            scrollHeight - scrollTop - clientHeight)(document.querySelector("main"))"""
        wait(page, "document.querySelector('main').scrollTop > 100")
        assert page.evaluate(end) < 60
        page.evaluate("document.querySelector('main').scrollTop = 0")
        page.wait_for_selector("#to-end:visible")
        length = page.evaluate("document.querySelector('.text').innerText.length")
        wait(page, f"document.querySelector('.text').innerText.length > {length} + 200")
        assert page.evaluate("document.querySelector('main').scrollTop") == 0
        page.click("#to-end")
        wait(page, f"{end} < 60")
        page.click("#stop")


MARKDOWN = [
    ("a *b* **c** ~~d~~", "<p>a <em>b</em> <strong>c</strong> <s>d</s></p>"),
    ("`e*f*` and ``a`b``", "<p><code>e*f*</code> and <code>a`b</code></p>"),
    ("2 * 3 * 4, snake_case_name", "<p>2 * 3 * 4, snake_case_name</p>"),
    ("**bold *and* more**", "<p><strong>bold <em>and</em> more</strong></p>"),
    (r"\*no\*", "<p>*no*</p>"),
    ("# One\n### Three", "<h3>One</h3><h5>Three</h5>"),
    ("- a\n- b\n  - c\n\nd", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>d</p>"),
    ("3. a\n\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("1. a\n   more\n\n   again", "<ol><li>a\nmore<p>again</p></li></ol>"),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
    ("x<y && y>z &amp;", "<p>x&lt;y &amp;&amp; y&gt;z &amp;amp;</p>"),
    ("a<br>b", "<p>a<br>b</p>"),
]


HOSTILE = ["`" * 50_000, "> " * 20_000, "*" * 50_000, "[" * 50_000, "- " * 20_000, "**a" * 20_000]


def test_markdown(browser: "Browser", tokenizer: Tokenizer) -> None:
    render = """async (text) => {
        const { blocksOf, nodeOf } = await import("/page/markdown.js");
        return blocksOf(text).map((block) => nodeOf(block).outerHTML).join("");
    }"""
    with serving(tokenizer) as server, opened(browser, server) as page:
        for text, html in MARKDOWN:
            assert page.evaluate(render, text) == html
        link = page.evaluate(render, "see https://example.org/a_b. [c](http://d.org)")
        assert re.findall(r'href="([^"]+)"', link) == ["https://example.org/a_b", "http://d.org"]
        assert link.count('rel="noopener noreferrer nofollow"') == 2
        table = page.evaluate(render, "| a | b |\n|:--|--:|\n| 1 | `x\\|y` |")
        assert '<td class="right"><code>x|y</code></td>' in table
        code = page.evaluate(render, "```python\na = '<b>'\n\n# no heading")
        assert "<span>python</span>" in code
        assert "<code>a = '&lt;b&gt;'\n\n# no heading</code>" in code
        for text in HOSTILE:  # made to take long, or to nest deep
            assert page.evaluate(render, text)
