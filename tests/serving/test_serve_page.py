"""Proves that the page at / sends a prompt to two models and shows both answers.

No content of an answer can run in the page, and the page uses no network other than its own
server's. The tests run in a headless Chromium, where there is one.
"""

import asyncio
import html
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.responses import HTMLResponse

from helpers import served
from helpers.browser import CHROMIUM, NO_CHROMIUM, chromium
from helpers.served import NAMES, alone, build, endless, http, serving, tokenizer, wait
from helpers.source import text
from minilora.generation.sequence import Ask
from minilora.serving import middleware

PAGE = text("minilora/serving/page.html")
PROMPT = "hello <b>world</b>"
KEY = "a key of eight"
SUBMIT = '$("form").requestSubmit();'
# Headless Chromium's clock stops while the headers of a response are awaited: /hold sends them when
# the page may continue.
DRIVER = """<script>
const hold = () => fetch("/hold", {headers: headers()});
addEventListener("load", async () => {
  $("prompt").value = %r; $("tokens").value = %d; $("token").value = %r;
  %s
  await hold();
});
</script>"""
FOUND = re.compile(r'<div class="answer"[^>]*>(.*?)</div><p class="(.*?)">(.*?)</p>', re.S)
STATE = '<span class="note" id="state" role="status">%s</span>'
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)


model = served.model


def driven(
    server: Any, key: str = "", tokens: int = 12, does: str = SUBMIT, *waits: Callable[[], Any]
) -> str:
    """Return the address of the page with a script that fills it in and runs `does`.

    By default the script presses the button. Each `hold()` lasts until the next of `waits` is true,
    by default until both answers are complete.
    """
    metrics = server.guard.metrics
    left = [*waits] or [lambda: metrics.finished.total() + metrics.requests["refused", 400] >= 2]

    @server.guard.app.get("/driven")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE + DRIVER % (PROMPT, tokens, key, does))

    @server.guard.app.get("/hold")
    async def hold() -> dict[str, str]:
        until, end = left.pop(0), time.monotonic() + 20
        while not until() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        return {}

    return f"{server.url}/driven"


def test_the_page_is_served_with_a_strict_content_policy(model):
    with serving(model) as server:
        answer = http.get(server.url)
    assert answer.text == PAGE
    policy = answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert policy.startswith("default-src 'none'; connect-src 'self'; ") and "unsafe" not in policy
    assert (
        len(re.findall("'sha256-[^']+'", policy))
        == 2
        == PAGE.count("<script>") + PAGE.count("<style>")
    )
    assert not re.search(r"https?://|innerHTML|src=|localStorage|document\.cookie", PAGE)


@needs_browser
def test_both_models_answer_side_by_side(model, tmp_path):
    with serving(model) as server:
        page = chromium(driven(server), tmp_path, "--dump-dom")
    ids = tokenizer().apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True
    )
    twin = build(adapters=2)
    wanted = [alone(twin, Ask(ids, adapter, 12)) for adapter in (None, NAMES[0])]
    found = FOUND.findall(page)
    assert [html.unescape(answer) for answer, *_ in found] == [
        one.replace("\r", "\n") for one in wanted
    ]
    assert all(
        re.fullmatch(r"12 tokens in \d+\.\d s, ended by (length|stop)", note) for *_, note in found
    )
    assert wanted[0] != wanted[1] and STATE % "" in page
    assert '<label id="key" hidden="">' in page  # the server needs no key


@needs_browser
def test_one_model_on_both_sides_gives_the_same_answer(model, tmp_path):
    """The second request is sent as plain text, with Ctrl + Enter."""
    does = SUBMIT + 'await hold(); $("mode").value = "text"; sides[1].model.value = "base";'
    does += (
        '$("prompt").dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", ctrlKey: true}));'
    )
    with serving(model) as server:
        waits = [
            lambda count=count: server.guard.metrics.finished.total() == count for count in (2, 4)
        ]
        page = chromium(driven(server, "", 12, does, *waits), tmp_path, "--dump-dom")
    wanted = alone(build(adapters=2), Ask(tokenizer().encode(PROMPT), None, 12)).replace("\r", "\n")
    assert [html.unescape(answer) for answer, *_ in FOUND.findall(page)] == [wanted] * 2
    assert STATE % "the same answer" in page


@needs_browser
def test_stop_ends_both_answers(model, tmp_path):
    """They end in the server too, and the page allows another request."""
    go_on = threading.Event()
    with endless(model) as server:
        metrics = server.guard.metrics

        def begun() -> bool:
            if both := metrics.first[float("inf")] == 2:
                server.worker.call(go_on.wait)  # so that an answer is left to stop
            return both

        does = SUBMIT + 'await hold(); $("stop").click();'
        page = chromium(
            driven(server, "", 400, does, begun, metrics.finished.total), tmp_path, "--dump-dom"
        )
        wait(lambda: metrics.finished.total() == 2)
        assert metrics.finished == {"left": 2}
        go_on.set()
    assert [found[1:] for found in FOUND.findall(page)] == [("note", "stopped")] * 2
    assert (
        '<button class="ask" id="ask">' in page
        and '<button type="button" id="stop" disabled="">' in page
    )


@needs_browser
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"timeout": 0.1}, "the answer was not complete at the time limit: ask for fewer tokens."),
        ({"max_tokens": 11}, "max_tokens: this server gives at most 11, got 400."),
    ],
)
def test_an_error_is_shown(model, tmp_path, limits, message):
    """The first error comes in the stream, and the second one instead of it."""
    with endless(model, **limits) as server:
        page = chromium(driven(server, tokens=400), tmp_path, "--dump-dom")
    assert [found[1:] for found in FOUND.findall(page)] == [("note wrong", message)] * 2


@needs_browser
@pytest.mark.parametrize("key", [KEY, ""])
def test_the_page_asks_for_a_key_if_the_server_needs_one(model, tmp_path, monkeypatch, key):
    monkeypatch.setattr(
        middleware, "PUBLIC", (*middleware.PUBLIC, "/driven", *([] if key else ["/hold"]))
    )
    with serving(model, token=KEY) as server:
        if not key:
            server.guard.metrics.finished["nobody"] = 2  # no request will be answered
        page = chromium(driven(server, key), tmp_path, "--dump-dom")
    assert '<label id="key">' in page  # shown, since the first request was refused
    notes = re.findall(r'<p class="note[^>]*>(.*?)</p>', page)
    assert all(note.startswith("12 tokens") for note in notes) if key else notes == ["", ""]
    assert key or "expected the server&#39;s token" in page or "expected the server's token" in page


@needs_browser
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_cut_at_any_width(model, tmp_path, width):
    """A narrow window puts one side below the other; nothing is wider than the window."""
    probe = (
        "<script>addEventListener('load', () => { "
        "document.title = document.documentElement.scrollWidth + ' ' + "
    )
    probe += (
        "sides.map(s => Math.round(s.answer.getBoundingClientRect().left)).join(' '); });</script>"
    )
    (tmp_path / "page.html").write_text(PAGE + probe)
    shown = chromium(
        (tmp_path / "page.html").as_uri(), tmp_path, f"--window-size={width},900", "--dump-dom"
    )
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", shown)
    assert found, shown[:500]
    wide, left, right = map(int, found.groups())
    # headless Chromium has no narrower window when it prints the page
    assert wide <= max(width, 500)
    assert (left < right) == (width == 1280)
