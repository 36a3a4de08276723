"""The chat page: its routing view as HTML, a visitor's session on the real worker, and all of it in a real browser."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import itertools
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from octavo.chat import Message
from octavo.experts.trace import record
from octavo.llm import LLM
from octavo.remote import RemoteModel
from octavo.sampling import SamplingParams
from octavo.serve.worker import Worker
from octavo.ui import routing
from octavo.ui.backend import Routed
from octavo.ui.local import LocalModel
from octavo.ui.page import application
from octavo.ui.session import Session, Shown
from octavo_server import serve
from run_octavo import refused, run
from ui_browser import CHROMIUM, QUESTION, bot, browser, look, send, server, status, visit, wait_until

NO_BROWSER = (
    "chromium is not installed"
    if CHROMIUM is None
    else "playwright is not installed"
    if importlib.util.find_spec("playwright") is None
    else ""
)
in_browser = pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
CREDENTIALS = {"username": "anybody", "password": "open-sesame"}
ENDLESS = {2: -100.0}  # the shipped model's end of text: without it a reply goes on to max_tokens
SLIDERS = ("Temperature", "Max new tokens", "Top-p", "Repetition penalty")
ATTACK = "<img src=x onerror=window.hit=1><script>window.hit=1</script>&amp;"

# ---------------------------------------- the routing view, as HTML


def random_routed(n_tokens: int, n_layers: int, n_experts: int, top_k: int, seed: int = 0) -> Routed:
    order = np.random.default_rng(seed).random((n_tokens, n_layers, n_experts)).argsort(axis=2)
    pieces = tuple(f" w{at}" for at in range(n_tokens))
    return Routed(pieces, order[:, :, :top_k].astype(np.int16), n_experts)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(2, 12), st.integers(1, 2), st.integers(0, 99))
def test_shares_are_counted(n_tokens: int, n_layers: int, n_experts: int, top_k: int, seed: int) -> None:
    routed = random_routed(n_tokens, n_layers, n_experts, top_k, seed)
    shares = routing.shares(routed.topk_ids, n_experts)
    for layer in range(n_layers):
        for expert in range(n_experts):
            count = int((routed.topk_ids[:, layer] == expert).sum())
            assert shares[layer, expert] == pytest.approx(count / (n_tokens * top_k))


def test_tokens_have_colour_number_and_words() -> None:
    routed = Routed(("a", " b\n", ""), np.array([[[3, 1]], [[11, 0]], [[0, 2]]], np.int16), 12)
    view = routing.tokens(routed, 0)
    spans = re.findall(r'<span class="octavo-token (\S+)" data-expert="(\d+)" title="([^"]+)">(.*?)</span>', view, re.S)
    assert spans == [
        ("octavo-e3", "3", "expert 3, then 1", "a"),
        ("octavo-e3", "11", "expert 11, then 0", " b↵\n"),
        ("octavo-e0", "0", "expert 0, then 2", "·"),
    ]


def test_the_view_shows_the_chosen_layer() -> None:
    routed = random_routed(20, 3, 8, 2)
    for layer in range(3):
        view = routing.routing_view(routed, layer)
        assert [int(one) for one in re.findall(r'data-expert="(\d+)"', view)] == routed.topk_ids[:, layer, 0].tolist()
        shares = 100 * routing.shares(routed.topk_ids, 8)
        assert re.findall(r"<td>([\d.]+) %</td>", view) == [f"{share:.1f}" for share in shares[layer]]
        rows = re.findall(r'<tr( class="octavo-chosen" aria-current="true")?><th scope="row">(\d)</th>(.*?)</tr>', view)
        marked = [int(number) - 1 for chosen, number, cells in rows if chosen]
        assert marked == [layer]
        in_grid = [[int(one) for one in re.findall(r">(\d+)</td>", cells)] for _, _, cells in rows if "--load" in cells]
        assert in_grid == [[int(f"{share:.0f}") for share in row] for row in shares]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_what_a_model_says_is_text_in_the_view(pieces: list[str]) -> None:
    pieces = [ATTACK, *pieces]
    routed = dataclasses.replace(random_routed(len(pieces), 1, 8, 2), pieces=tuple(pieces))
    view = routing.routing_view(routed, 0)
    assert ATTACK not in view
    assert "<img" not in view
    assert "<script" not in view
    shown = re.findall(r'<span class="octavo-token[^>]*>(.*?)</span>', view, re.S)
    assert [html.unescape(one).replace("↵\n", "\n") for one in shown] == [
        (piece or "·").replace("↵\n", "\n") for piece in pieces
    ]


def test_nothing_to_show_says_so() -> None:
    assert "as soon as a reply comes" in routing.routing_view(Routed((), np.empty((0, 1, 1), np.int16), 8), 3)


# ---------------------------------------- a visitor's session, on the real worker


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("menny")


@pytest.fixture
def worker(llm: LLM) -> Iterator[Worker]:
    with Worker(llm) as one:
        yield one


@pytest.fixture
def local(llm: LLM, worker: Worker) -> LocalModel:
    return LocalModel(llm, worker)


@pytest.fixture
def session(llm: LLM) -> Iterator[Session]:
    """A visitor's. In the end nothing is watched any more."""
    yield Session()
    assert n_hooks(llm) == 0


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 30} | options))


def told(shown: Iterator[Shown]) -> list[Shown]:
    return list(shown)


def n_hooks(llm: LLM) -> int:
    return sum(len(router._forward_hooks) for router in llm.model.routers())


def idle(worker: Worker) -> bool:
    """Whether it comes to rest within a second."""
    give_up = time.monotonic() + 1
    while worker.stats().running or worker.stats().waiting:
        if time.monotonic() > give_up:
            return False
        time.sleep(0.005)
    return True


def test_a_conversation(llm: LLM, local: LocalModel, session: Session) -> None:
    system = "You are Menny."
    first = told(session.reply(local, " What is a router? ", system, params()))
    asked = [Message("user", "What is a router?")]
    expected = llm.template.render([Message("system", system), *asked])
    assert first[0] == Shown(asked, "…", "")
    texts = [shown.turns[-1].content for shown in first[1:]]
    assert all(late.startswith(early) for early, late in itertools.pairwise(texts))
    assert len(texts[-1]) > 10
    assert re.search(rf"\d+ tokens · \d+ tok/s · prompt {len(expected)}", first[-1].status)
    assert session.turns == [*asked, Message("assistant", texts[-1])]
    second = told(session.reply(local, "Why?", system, params()))
    assert second[-1].turns == session.turns
    assert len(session.turns) == 4


def test_the_view_is_what_the_routers_chose(llm: LLM, local: LocalModel, session: Session) -> None:
    assert session.view() == ""
    last = told(session.reply(local, "What is a mixture of experts?", "", params()))[-1]
    stream = session._stream
    routed = stream.routed()  # type: ignore[union-attr]
    token_ids = stream.result.token_ids  # type: ignore[union-attr]
    prompt = llm.template.render([Message("user", "What is a mixture of experts?")])
    assert n_hooks(llm) == 0  # it is over, and watched no more
    with record(llm.model) as recording:
        LLM(llm.model, llm.tokenizer, prefix_bytes=0).generate([*prompt, *token_ids[:-1]], max_tokens=1)
    whole = recording.trace().topk_ids
    np.testing.assert_array_equal(routed.topk_ids, whole[len(prompt) :][: len(token_ids) - 1])
    assert "".join(routed.pieces) == last.turns[-1].content[: len("".join(routed.pieces))]


def test_the_view_comes_while_it_is_looked_at(local: LocalModel, session: Session) -> None:
    long = params(max_tokens=150, logit_bias=ENDLESS)
    views = [shown.routing for shown in session.reply(local, "Tell me all.", "", long)]
    assert not any(views[:-1])  # nobody looked
    assert views[-1]
    session.view_open, session.layer = True, 2
    views = [shown.routing for shown in session.reply(local, "Tell me more.", "", long)]
    views = [view for view in views if view and "data-expert" in view]
    counts = [len(re.findall("data-expert", view)) for view in views]
    assert len(counts) >= 2
    assert counts == sorted(counts)
    assert all("of layer 3" in view for view in views)


def test_stop_keeps_what_was_said(local: LocalModel, worker: Worker, session: Session) -> None:
    reply = session.reply(local, "Tell me all.", "", params(max_tokens=400, logit_bias=ENDLESS))
    shown = next(reply)
    while len(shown.turns) < 2 or len(shown.turns[1].content) < 5:
        shown = next(reply)
    session.stop()
    last = told(reply)[-1]
    assert last.status.endswith("stopped")
    assert int(last.status.split()[0]) < 400
    assert session.turns == last.turns
    assert session.turns[1].content.startswith(shown.turns[1].content)
    assert idle(worker)


def test_clear_in_the_middle_leaves_nothing(llm: LLM, local: LocalModel, worker: Worker, session: Session) -> None:
    reply = session.reply(local, "Tell me all.", "", params(max_tokens=400, logit_bias=ENDLESS))
    for _ in range(3):
        next(reply)
    session.clear()
    rest = told(reply)
    assert all(shown.turns == [] for shown in rest)
    assert rest[-1] == Shown([], "", None, "")
    assert session.turns == []
    assert idle(worker)
    assert n_hooks(llm) == 0


def test_a_visitor_who_leaves_stops_the_model(llm: LLM, local: LocalModel, worker: Worker, session: Session) -> None:
    reply = session.reply(local, "Tell me all.", "", params(max_tokens=400, logit_bias=ENDLESS))
    for _ in range(3):
        next(reply)
    reply.close()
    session.clear()
    assert idle(worker)
    assert worker.stats().finished["cancelled"] == 1
    assert n_hooks(llm) == 0


def test_regenerate_asks_again(local: LocalModel, session: Session) -> None:
    assert "no reply" in told(session.regenerate(local, "", params()))[-1].status
    told(session.reply(local, "What is top-p?", "", params()))
    before = session.turns
    last = told(session.regenerate(local, "", params(temperature=3.0, seed=3)))[-1]
    assert last.turns[0] == before[0]
    assert last.turns[1] != before[1]
    assert session.turns == last.turns
    same = told(session.regenerate(local, "", params()))[-1]
    assert same.turns == before


def test_what_cannot_be_asked_is_given_back(local: LocalModel, session: Session) -> None:
    told(session.reply(local, "Hello.", "", params()))
    before = session.turns
    too_long = "word " * 2000
    last = told(session.reply(local, too_long, "", params()))[-1]
    assert last.question == too_long.strip()
    assert last.turns == session.turns == before
    assert "context" in last.status
    assert "Write something" in told(session.reply(local, "  ", "", params()))[-1].status
    told(session.regenerate(local, too_long, params()))
    assert session.turns == before  # the old reply stays


def test_one_reply_at_a_time(local: LocalModel, session: Session) -> None:
    first = session.reply(local, "Tell me all.", "", params())
    next(first)
    assert told(session.reply(local, "And?", "", params())) == [Shown([], "A reply is under way; Stop ends it.")]
    told(first)
    assert len(session.turns) == 2


def test_the_oldest_exchanges_make_room(local: LocalModel, session: Session) -> None:
    session.turns = [Message(role, f"{number} {'word ' * 60}") for number in range(6) for role in ("user", "assistant")]
    last = told(session.reply(local, "Are you there?", "Be brief.", params()))[-1]
    assert "left out" in last.status
    assert len(session.turns) == 14  # on the page they stay


def test_a_model_elsewhere(llm: LLM) -> None:
    """The same session on `octavo serve`: the same reply, without a routing view; Stop hangs up."""
    session = Session(view_open=True)
    with serve(llm) as address:
        remote = RemoteModel(address)
        last = told(session.reply(remote, "What is a router?", "", params()))[-1]
        assert "tok/s" in last.status
        assert not last.routing
        assert last.turns[-1].content == session.turns[-1].content == llm.chat(last.turns[:1], params()).text
        reply = session.reply(remote, "Tell me all.", "", params(max_tokens=400, logit_bias=ENDLESS))
        shown = next(reply)
        while len(shown.turns) < 4 or len(shown.turns[3].content) < 5:
            shown = next(reply)
        session.stop()
        last = told(reply)[-1]
        assert last.status.endswith("stopped")
        assert session.turns == last.turns
        assert len(session.turns) == 4
    last = told(session.reply(remote, "Are you there?", "", params()))[-1]
    assert "cannot be reached" in last.status
    assert last.question == "Are you there?"


# ---------------------------------------- the application


@pytest.fixture
def client(local: LocalModel) -> Iterator[TestClient]:
    with TestClient(application(local, persona="menny", name="menny"), base_url="http://127.0.0.1") as one:
        yield one


def test_only_the_chat_can_be_reached(client: TestClient) -> None:
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/proxy=http://a.b/c",
                 "/gradio_api/upload_progress", "/monitoring", "/gradio_api/openapi.json", "/gradio_api/runs",
                 "/gradio_api/vibe-code", "/gradio_api/stream/a/b/c/playlist.m3u8"):  # fmt: skip
        answer = client.get(path)
        assert (answer.status_code, answer.text) == (404, "not found"), path
    for path in ("/gradio_api/upload", "/gradio_api/run/reply", "/gradio_api/call/reply", "/gradio_api/vibe-edit",
                 "/gradio_api/process_recording", "/gradio_api/component_server"):  # fmt: skip
        assert client.post(path, json={}).status_code == 404, path
    assert client.get("/config").status_code == 200


def test_the_page_may_load_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert "*" not in policy
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?https?://", answer.text)
    assert "fonts.googleapis" not in answer.text + client.get("/theme.css").text
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert all(one["api_visibility"] == "private" for one in config["dependencies"])


def test_everything_has_a_label(client: TestClient) -> None:
    kinds = {"textbox", "slider", "radio", "chatbot"}
    labels = [one["props"].get("label") for one in client.get("/config").json()["components"] if one["type"] in kinds]
    assert len(labels) == 9
    assert all(labels)


# ---------------------------------------- the command


def test_a_public_host_needs_a_password() -> None:
    refused(run("ui", "--host", "0.0.0.0"), "--host 0.0.0.0", hint="--api-key")


def test_bad_options_are_told_before_anything_is_loaded() -> None:
    refused(run("ui", "-o", "temprature=1"), "temprature", hint="temperature")
    refused(run("ui", "-o", "temperature=-1"), "temperature")
    refused(run("ui", "x", "--remote", "a/b"), "--remote", hint="leave out")
    refused(run("ui", "--remote", "not an address"), "not an address")


# ---------------------------------------- in a browser


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    bias = ",".join(f"{token}:{bias}" for token, bias in ENDLESS.items())
    with server("--api-key", CREDENTIALS["password"], "-o", f"logit_bias={bias}", "-o", "max_tokens=150") as one:
        yield one


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def window(chromium: Any) -> Iterator[Any]:
    """One that knows the password; its tabs share what the browser has loaded before."""
    one = chromium.new_context(http_credentials=CREDENTIALS)
    yield one
    one.close()


@pytest.fixture
def page(address: str, window: Any) -> Iterator[Any]:
    with look(window, address) as one:
        yield one


def set_slider(page: Any, label: str, value: float) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


@in_browser
def test_send_and_stream(page: Any) -> None:
    assert "Menny" in page.inner_text("#octavo-chat")  # she greets
    send(page, "Who are you?", wait=False)
    seen: set[str] = set()
    wait_until(page, lambda: seen.add(bot(page)) or "tok/s" in status(page))
    lengths = sorted(len(text) for text in seen)
    assert len(lengths) >= 4  # it grew
    assert all(bot(page).startswith(text) for text in seen)
    assert re.match(r"150 tokens · \d+ tok/s · prompt \d+", status(page))
    assert page.inner_text("#octavo-chat .user").strip().startswith("Who are you?")


@in_browser
def test_html_is_text(page: Any) -> None:
    send(page, f"{ATTACK} ![x](http://example.org/x.png) `<b>`")
    shown = page.inner_text("#octavo-chat .user")
    assert ATTACK in shown
    assert "![x](http://example.org/x.png)" in shown
    assert "<b>" in shown
    assert page.query_selector_all("#octavo-chat .user img, #octavo-chat script, #octavo-chat b") == []
    assert page.evaluate("window.hit") is None


@in_browser
def test_stop_and_go_on(page: Any) -> None:
    set_slider(page, "Max new tokens", 450)
    send(page, "Tell me everything.", wait=False)
    wait_until(page, lambda: len(bot(page)) > 10)
    page.click("#octavo-stop")
    wait_until(page, lambda: "stopped" in status(page))
    assert int(status(page).split()[0]) < 450
    stopped_at = bot(page)
    page.wait_for_timeout(300)
    assert bot(page) == stopped_at
    set_slider(page, "Max new tokens", 20)
    send(page, "Go on.", wait=False)
    wait_until(page, lambda: status(page).startswith("20 tokens · "))


@in_browser
def test_regenerate_and_clear(page: Any) -> None:
    set_slider(page, "Temperature", 1.5)
    send(page, "Who are you?")
    first = bot(page)
    page.click("#octavo-again")
    wait_until(page, lambda: "tok/s" in status(page) and bot(page) != first)
    assert page.inner_text("#octavo-chat").count("Who are you?") == 1
    page.click("#octavo-clear")
    wait_until(page, lambda: "Who are you?" not in page.inner_text("#octavo-chat"))
    assert bot(page) == status(page) == ""


@in_browser
def test_a_persona_brings_its_prompt_and_its_defaults(page: Any) -> None:
    system, temperature = page.get_by_label("System prompt"), page.get_by_label("number input for Temperature")
    assert "Menny" in system.input_value()
    assert temperature.input_value() == "0.3"
    page.get_by_label("none", exact=True).check()
    wait_until(page, lambda: system.input_value() == "")
    wait_until(page, lambda: temperature.input_value() == "0.7")
    assert "Menny" not in page.inner_text("#octavo-chat")
    page.get_by_label("Menny", exact=True).check()
    wait_until(page, lambda: "Menny" in system.input_value())
    wait_until(page, lambda: temperature.input_value() == "0.3")


@in_browser
def test_the_routing_view(page: Any) -> None:
    set_slider(page, "Max new tokens", 450)
    page.click("#octavo-experts button")
    page.wait_for_selector("#octavo-layer", state="visible")
    send(page, "Tell me everything.", wait=False)
    counts: set[int] = set()
    wait_until(
        page, lambda: counts.add(len(page.query_selector_all(".octavo-token"))) or "tok/s" in status(page), seconds=60
    )
    assert len(counts) >= 4  # it grew while the reply came
    wait_until(page, lambda: len(page.query_selector_all(".octavo-token")) == int(status(page).split()[0]) - 1)
    assert len(page.query_selector_all(".octavo-chip")) == 8
    experts = "[...document.querySelectorAll('.octavo-token')].map(one => one.dataset.expert).join()"
    first = page.evaluate(experts)
    slider = page.get_by_label("range slider for Layer")
    slider.focus()
    page.keyboard.press("ArrowRight")
    wait_until(page, lambda: page.query_selector("[aria-label$='of layer 2']") is not None)
    assert page.evaluate(experts) != first
    assert page.inner_text(".octavo-chosen th") == "2"
    shares = [float(one.inner_text().removesuffix(" %")) for one in page.query_selector_all(".octavo-bars td + td")]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(100, abs=0.5)
    colours = (
        "new Set([...document.querySelectorAll('.octavo-chip')].map(one => getComputedStyle(one).background)).size"
    )
    assert page.evaluate(colours) == 8


@in_browser
def test_the_keyboard_is_enough(page: Any) -> None:
    focused = "document.activeElement.closest('[id^=octavo-]')?.id"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(focused) == "octavo-question"  # from the beginning
    set_slider(page, "Max new tokens", 450)  # so that there is time to stop
    page.focus(QUESTION)
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value(QUESTION) == "one\ntwo"
    page.keyboard.press("Enter")
    wait_until(page, lambda: len(bot(page)) > 10)
    for expected in ("send", "stop"):
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == f"octavo-{expected}"
        assert page.evaluate(outline) == "solid"
    page.keyboard.press("Enter")
    wait_until(page, lambda: "stopped" in status(page))
    for expected in ("again", "clear", "experts"):
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == f"octavo-{expected}"
    page.keyboard.press("Enter")
    page.wait_for_selector(".octavo-grid")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.labels?.[0]?.innerText")
        )
    named = {"range slider for Layer", "Menny", "System prompt", *(f"range slider for {one}" for one in SLIDERS)}
    assert named <= set(reached)


@in_browser
def test_a_phone_needs_no_sideways_scrolling(address: str, chromium: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "http_credentials": CREDENTIALS}
    with visit(chromium, address, **phone) as page:
        page.click("#octavo-experts button")
        send(page, f"{'unbroken' * 30} and `{'code' * 40}`")
        page.wait_for_selector(".octavo-grid")
        assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [390, 390]
        over = """[...document.querySelectorAll('button, input, textarea, .octavo-bars, .octavo-tokens')].filter(one =>
            one.offsetParent && (one.getBoundingClientRect().right > 391 || one.scrollWidth > one.clientWidth + 2))
            .map(one => one.outerHTML.slice(0, 200))"""
        assert page.evaluate(over) == []


@in_browser
def test_tabs_talk_at_once(address: str, window: Any) -> None:
    with look(window, address) as one, look(window, address) as other:
        send(one, "What is a router?", wait=False)
        send(other, "What is temperature?", wait=False)
        for page in (one, other):
            wait_until(page, lambda page=page: "tok/s" in status(page))
        assert "router" not in other.inner_text("#octavo-chat .user")
        assert "temperature" not in one.inner_text("#octavo-chat .user")


@in_browser
def test_a_closed_tab_stops_its_reply(llm: LLM, local: LocalModel, worker: Worker, chromium: Any) -> None:
    app = application(local, options={"logit_bias": ENDLESS, "max_tokens": 400})
    http = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=http.run)
    thread.start()
    try:
        while not http.started:
            time.sleep(0.01)
        port = http.servers[0].sockets[0].getsockname()[1]
        with visit(chromium, f"http://127.0.0.1:{port}/") as page:
            send(page, "Tell me all.", wait=False)
            wait_until(page, lambda: len(bot(page)) > 10)
        assert idle(worker)
        assert worker.stats().finished["cancelled"] == 1
        assert n_hooks(llm) == 0
    finally:
        http.should_exit = True
        thread.join()


@in_browser
def test_without_the_password_nothing_comes(address: str) -> None:
    for path in ("", "config", "theme.css", "gradio_api/queue/data?session_hash=a"):
        assert httpx.get(address + path).status_code == 401
        assert httpx.get(address + path, auth=("anybody", "wrong")).status_code == 401
    assert httpx.get(f"{address}config", auth=("anybody", CREDENTIALS["password"])).status_code == 200
