"""The page in a real browser: an image, a question, an answer that streams in with its times; by mouse, by keys alone, on a phone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import Running, encoded, served, served_slowly

from masters.runtime import Vlm
from masters.runtime.service import content_policy

playwright = pytest.importorskip("playwright.sync_api", reason="the package 'playwright' drives the browser")
CHROMIUM = shutil.which("chromium")
PAGE = Path(__file__).parents[2] / "runtime" / "page.html"
QUESTION, AGAIN = "what colour is the shape?", "and is it larger than the other one?"
SIZES: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # As root, as in a container, Chromium has no sandbox.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    with served(bundle, "--name", "student") as running:
        yield running


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens the page of a server; at the end nothing may have been asked of anyone else, and no error may stand in the console."""
    contexts: list[Any] = []
    troubles: list[str] = []

    def visit(server: Running, size: str = "desktop", expected: str = "nothing", **options: Any) -> Any:
        context = browser.new_context(**SIZES[size], **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" and expected not in message.text else None)
        page.on("request", lambda request: troubles.append(request.url) if not request.url.startswith((server.url, "data:", "blob:")) else None)
        page.goto(server.url)
        page.get_by_text("student", exact=True).wait_for()
        page.locator("#length").evaluate("field => field.value = 12")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "shape.png"
    file.write_bytes(encoded(1))
    return file


def add_image(page: Any, image: Path) -> None:
    page.locator("#file").set_input_files(image)
    page.get_by_role("list", name="Images for the next question").get_by_role("img", name=image.name).wait_for()


def ask(page: Any, question: str, nth: int = 0) -> str:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".times dl").nth(nth).wait_for()
    return str(page.locator(".answer .text").nth(nth).text_content())


def shown(text: str) -> str:
    """Text as a page gives it back: without what HTML can't hold, and with its own line ends."""
    return text.replace("\x00", "\ufffd").replace("\r\n", "\n").strip()


@pytest.mark.parametrize("size", SIZES)
def test_ask_and_follow_up(size: str, open_page: Any, server: Running, vlm: Vlm, image: Path) -> None:
    page = open_page(server, size)
    add_image(page, image)
    assert page.locator("#stage img").bounding_box()["height"] >= 190, "the image is shown large before the first question"
    first = ask(page, QUESTION)
    assert shown(first) == shown(vlm.answer(QUESTION, [encoded(1)], max_tokens=12).text)
    times = page.locator(".times dl").first.inner_text().replace("\n", " ")
    for name in ("Image", "First token", "Per token", "Total"):
        assert re.search(rf"{name} [\d.]+ m?s", times) or (name == "Image" and "seen before" in times), times
    assert re.search(r"Tokens \d+", times)
    second = ask(page, AGAIN, nth=1)
    turns = [{"type": "image"}, {"type": "text", "text": QUESTION}], [{"type": "text", "text": first}], [{"type": "text", "text": AGAIN}]
    messages = [{"role": role, "content": content} for role, content in zip(("user", "assistant", "user"), turns, strict=True)]
    expected = vlm.reply(messages, [encoded(1)]).answer.text
    assert shown(expected).startswith(shown(second)[:8]), "the follow-up sees the conversation"
    assert "seen before" in page.locator(".times dl").nth(1).inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
    small = page.evaluate("[...document.querySelectorAll('button')].filter(b => b.offsetHeight && (b.offsetHeight < 44 || b.offsetWidth < 44)).length")
    assert small == 0, "a button is too small for a finger"


def test_keys_alone(open_page: Any, server: Running, image: Path) -> None:
    """Tab to the button, choose, type, Enter; then the status tells a screen reader the answer."""
    page = open_page(server)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the question"
    page.keyboard.press("Tab")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(image)
    page.get_by_role("img", name=image.name).wait_for()
    status = page.get_by_role("status")
    assert "One image is ready" in status.text_content()
    page.keyboard.type("what is it?")  # the field has the focus already
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("say")
    page.keyboard.press("Enter")
    page.locator(".times dl").wait_for()
    assert page.locator(".question p").text_content() == "what is it?\nsay"
    assert status.text_content().startswith("Answer: ")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    assert "New conversation" in page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    assert page.locator("#turns li").count() == 0
    assert page.get_by_role("heading", name="Show it an image, then ask").is_visible()


def test_names_for_screen_readers(open_page: Any, server: Running, image: Path) -> None:
    page = open_page(server, "phone")
    assert page.get_by_role("button", name="Take a photo").count() == 2
    assert page.locator("#camera").get_attribute("capture") == "environment"
    add_image(page, image)
    page.get_by_role("button", name=f"Remove {image.name}").click()
    assert page.get_by_role("region", name="Show it an image, then ask").is_visible()
    add_image(page, image)
    ask(page, QUESTION)
    conversation = page.get_by_role("list", name="Conversation")
    assert conversation.get_by_role("img", name=f"Your image {image.name}").is_visible()
    assert [heading.text_content() for heading in conversation.get_by_role("heading").all()] == ["You asked", "Answer"]
    assert page.evaluate(
        "[...document.querySelectorAll('button, input:not([hidden]), textarea')].every(e => e.textContent.trim() || e.ariaLabel || e.labels?.length)"
    )


def test_an_image_dropped_or_pasted(open_page: Any, server: Running) -> None:
    page = open_page(server)
    assert page.get_by_role("button", name="Take a photo").count() == 0, "a desktop has no camera button"
    make = """([bytes, name, type]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
        return transfer;
    }"""
    dropped = page.evaluate_handle(make, [list(encoded(1)), "dropped.png", "image/png"])
    page.locator("body").dispatch_event("drop", {"dataTransfer": dropped})
    page.get_by_role("img", name="dropped.png").wait_for()
    pasted = page.evaluate_handle(make, [list(encoded(2)), "pasted.png", "image/png"])
    page.evaluate("data => document.body.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data, bubbles: true }))", pasted)
    page.get_by_role("img", name="pasted.png").wait_for()
    page.locator("body").dispatch_event("drop", {"dataTransfer": page.evaluate_handle(make, [[1, 2], "notes.txt", "text/plain"])})
    playwright.expect(page.get_by_role("alert")).to_have_text("notes.txt: no image.")
    ask(page, "which one?")
    assert page.locator(".question img").count() == 2


def test_stop(open_page: Any, bundle: Path) -> None:
    with served_slowly(bundle, "name='student'", delay=0.03) as server:
        page = open_page(server)
        page.locator("#length").evaluate("field => field.value = 400")
        for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
            page.get_by_label("Question", exact=True).fill("tell me a long story")
            page.keyboard.press("Enter")
            answer = page.locator(".answer .text").last
            playwright.expect(answer).not_to_be_empty()
            stop()
            playwright.expect(page.locator(".waiting").last).to_have_text("Stopped")
            server.wait_for("masters_running", 0)
            assert page.get_by_role("button", name="Ask", exact=True).is_visible()
        assert server.metric("masters_generated_tokens_total") < 400
        assert server.metric("masters_cancelled_total") == 2


def test_a_refusal_is_shown_and_can_be_mended(open_page: Any, server: Running, tmp_path: Path) -> None:
    page = open_page(server, expected="400 (Bad Request)")
    broken = tmp_path / "broken.png"
    broken.write_bytes(encoded(1)[:200])
    add_image(page, broken)
    page.get_by_label("Question", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    assert "Could not decode" in page.get_by_role("alert").text_content()
    assert page.get_by_label("Question", exact=True).input_value() == QUESTION
    page.get_by_role("button", name="Remove broken.png").click()
    page.keyboard.press("Enter")
    page.locator(".times dl").wait_for()
    assert page.get_by_role("alert").count() == 0


def test_a_key_is_asked_for(open_page: Any, bundle: Path) -> None:
    with served(bundle, "--name", "student", key="open-sesame") as server:
        page = open_page(server, expected="401 (Unauthorized)")
        page.get_by_label("Question", exact=True).fill(QUESTION)
        page.keyboard.press("Enter")
        page.get_by_role("dialog", name="This server asks for a key").wait_for()
        page.get_by_label("API key").fill("open-sesame")
        page.keyboard.press("Enter")
        page.locator(".times dl").wait_for()
        assert page.evaluate("localStorage.length") == 0, "the key outlives the tab"


def test_what_an_answer_says_never_runs(open_page: Any, server: Running) -> None:
    page = open_page(server, expected="Content Security Policy")
    policy = server.request("GET", "/")[1]["content-security-policy"]
    assert policy == content_policy(PAGE.read_text())
    assert "unsafe" not in policy
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= {part.strip() for part in policy.split(";")}
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.ran = true' }))")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = true\">')")
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None
    ask(page, "<b>bold</b> & <script>1</script>")
    assert page.locator(".question p").text_content() == "<b>bold</b> & <script>1</script>"


def test_light_and_dark(open_page: Any, server: Running) -> None:
    grounds = {scheme: open_page(server, color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor") for scheme in ("light", "dark")}
    light, dark = (sum(map(int, re.findall(r"\d+", grounds[scheme])[:3])) for scheme in ("light", "dark"))
    assert light > 700
    assert dark < 100


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for what one must see to use the page."""
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", PAGE.read_text(), flags=re.DOTALL)[scheme]))
    texts = [("ink", "paper"), ("ink", "card"), ("ink", "tint"), ("soft", "paper"), ("soft", "card"), ("on-accent", "accent"), ("bad", "bad-tint")]
    marks = [("accent", "paper"), ("accent", "card"), ("field", "card"), ("field", "paper")]
    for least, pairs in ((4.5, texts), (3, marks)):
        for one, other in pairs:
            bright, dim = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= least, f"{one} on {other}"
