"""`octavo ui` as a process, and a browser at it. As a script: take the screenshots of docs/ui.md.

python tests/ui_browser.py docs/images
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from run_octavo import command

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
QUESTION, CHAT, STATUS = "#octavo-question textarea", "#octavo-chat", "#octavo-status"


@contextlib.contextmanager
def server(*options: str) -> Iterator[str]:
    """A running `octavo ui`; its address. In the end Ctrl-C must end it in peace."""
    process = subprocess.Popen(
        command("ui", "--port", "0", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise AssertionError(f"no address came: {process.communicate(timeout=30)[1]}")
        yield address
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert out == ""
        assert "Traceback" not in err, err
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield one
        finally:
            one.close()


@contextlib.contextmanager
def visit(chromium: Any, address: str, **options: Any) -> Iterator[Any]:
    """The page in a window of its own. It must ask its own host alone, and run without an error."""
    context = chromium.new_context(**options)
    try:
        with look(context, address) as page:
            yield page
    finally:
        context.close()


@contextlib.contextmanager
def look(context: Any, address: str) -> Iterator[Any]:
    """The page in a tab; see `visit`."""
    page = context.new_page()
    hosts, errors = set(), []
    page.on("request", lambda request: hosts.add((urlsplit(request.url).scheme, urlsplit(request.url).netloc)))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector(QUESTION)
    try:
        yield page
        asked = {netloc for scheme, netloc in hosts if scheme not in ("data", "blob")}
        assert asked == {urlsplit(address).netloc}
        assert not errors
    finally:
        page.close()


def wait_until(page: Any, holds: Any, seconds: float = 30) -> None:
    """Look again and again until it holds."""
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up, f"it did not come to hold: {page.inner_text('body')[-1500:]}"
        page.wait_for_timeout(30)


def status(page: Any) -> str:
    """How the last reply went, or goes."""
    return str(page.inner_text(f"{STATUS} .octavo-status"))


def bot(page: Any) -> str:
    """The last reply's text."""
    replies = page.query_selector_all(f"{CHAT} .bot.message, {CHAT} .message.bot")
    return str(replies[-1].inner_text()).strip() if replies else ""


def send(page: Any, text: str, *, wait: bool = True) -> None:
    """Type a message and press Enter; perhaps wait for the whole reply."""
    page.fill(QUESTION, text)
    page.press(QUESTION, "Enter")
    wait_until(page, lambda: page.input_value(QUESTION) == "")
    if wait:
        wait_until(page, lambda: "tok/s" in status(page))


def main(folder: Path) -> None:
    """Take the screenshots."""
    folder.mkdir(parents=True, exist_ok=True)
    with server("-o", "seed=4") as address, browser() as chromium:
        with visit(chromium, address, viewport={"width": 1180, "height": 860}) as page:
            send(page, "What is a mixture of experts?")
            send(page, "And who decides which expert gets a token?")
            page.wait_for_timeout(500)
            page.screenshot(path=folder / "ui-chat.png")
            page.click("#octavo-experts button")
            page.wait_for_selector(".octavo-grid")
            page.fill("#octavo-layer input[type=number]", "3")
            page.press("#octavo-layer input[type=number]", "Tab")
            page.wait_for_timeout(800)
            page.locator("#octavo-experts").screenshot(path=folder / "ui-experts.png")
        phone = {"width": 390, "height": 844}
        with visit(chromium, address, viewport=phone, color_scheme="dark", has_touch=True) as page:
            send(page, "What is a mixture of experts?")
            page.wait_for_timeout(500)
            page.screenshot(path=folder / "ui-phone.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
