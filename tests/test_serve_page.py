"""Proves that the page at / asks both models and shows what they say, that nothing an answer holds can run there, and
that it needs no network but its own server's. In a headless Chromium, where there is one.
"""

import asyncio
import html
import re
from typing import Any

import pytest
from fastapi.responses import HTMLResponse

from browser import CHROMIUM, NO_CHROMIUM, chromium
from minilora.serve import guard
from minilora.serve.request import Ask
from served import NAMES, alone, build, http, serving, tokenizer
from source import text

PAGE = text("minilora/serve/page.html")
PROMPT = "hello <b>world</b>"
KEY = "a key of eight"
# Headless Chromium's clock stands still while an answer's head is awaited: /hold gives it when both answers are done.
DRIVER = """<script>
addEventListener("load", async () => {
  $("prompt").value = %r; $("tokens").value = 12; $("token").value = %r;
  $("form").requestSubmit();
  await fetch("/hold", {headers: headers()});
});
</script>"""
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)


@pytest.fixture(scope="module")
def model():
    return build(adapters=2)


def driven(server: Any, key: str = "") -> str:
    """The address of the page with somebody who fills it in and presses the button."""
    metrics = server.guard.metrics

    @server.guard.app.get("/driven")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE + DRIVER % (PROMPT, key))

    @server.guard.app.get("/hold")
    async def hold() -> dict[str, str]:
        while metrics.finished.total() < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        return {}

    return f"{server.url}/driven"


def test_the_page_is_served_whole_and_runs_nothing_else(model):
    with serving(model) as server:
        answer = http.get(server.url)
    assert answer.text == PAGE
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ") and "unsafe" not in policy
    assert len(re.findall("'sha256-[^']+'", policy)) == 2 == PAGE.count("<script>") + PAGE.count("<style>")
    assert not re.search(r"https?://|innerHTML|src=|localStorage|document\.cookie", PAGE)


@needs_browser
def test_both_models_answer_side_by_side(model, tmp_path):
    with serving(model) as server:
        page = chromium(driven(server), tmp_path, "--dump-dom")
    ids = tokenizer().apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    twin = build(adapters=2)
    wanted = [alone(twin, Ask(ids, adapter, 12)) for adapter in (None, NAMES[0])]
    found = re.findall(r'<div class="answer"[^>]*>(.*?)</div><p class="note">(.*?)</p>', page, re.S)
    assert [html.unescape(answer) for answer, _ in found] == [
        wanted[0].replace("\r", "\n"),
        wanted[1].replace("\r", "\n"),
    ]
    assert all(re.fullmatch(r"12 tokens in \d+\.\d s, ended by (length|stop)", note) for _, note in found)


@needs_browser
@pytest.mark.parametrize("key", [KEY, ""])
def test_the_key_is_asked_for_where_there_is_one(model, tmp_path, monkeypatch, key):
    monkeypatch.setattr(guard, "PUBLIC", (*guard.PUBLIC, "/driven", *([] if key else ["/hold"])))
    with serving(model, token=KEY) as server:
        if not key:
            server.guard.metrics.finished["nobody"] = 2  # nothing is going to be answered
        page = chromium(driven(server, key), tmp_path, "--dump-dom")
    assert '<label id="key">' in page  # shown, since the first question was refused
    notes = re.findall(r'<p class="note[^>]*>(.*?)</p>', page)
    assert all(note.startswith("12 tokens") for note in notes) if key else notes == ["", ""]
    assert key or "expected the server&#39;s token" in page or "expected the server's token" in page


@needs_browser
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_cut_at_any_width(model, tmp_path, width):
    """A narrow window puts one side under the other; nothing is wider than the window."""
    probe = "<script>addEventListener('load', () => { document.title = document.documentElement.scrollWidth + ' ' + "
    probe += "sides.map(s => Math.round(s.answer.getBoundingClientRect().left)).join(' '); });</script>"
    (tmp_path / "page.html").write_text(PAGE + probe)
    shown = chromium((tmp_path / "page.html").as_uri(), tmp_path, f"--window-size={width},900", "--dump-dom")
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", shown)
    assert found, shown[:500]
    wide, left, right = map(int, found.groups())
    assert wide <= max(width, 500)  # no window of headless Chromium is narrower where it prints the page
    assert (left < right) == (width == 1280)
