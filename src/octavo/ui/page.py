"""The chat page, with Gradio: `build` makes it, `mount` puts it on a FastAPI application."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from starlette.routing import Mount

from octavo.chat import Message, Persona
from octavo.sampling import SamplingParams
from octavo.ui.backend import Backend
from octavo.ui.guard import Guard
from octavo.ui.local import LocalModel
from octavo.ui.session import Session, Shown

NONE = "none"
MOST_TOKENS = 4096  # the slider's end, where the context is not shorter
GREETINGS = {"menny": "Menny. Ask, then. I haven't got all epoch."}
_CSS = Path(__file__).with_name("page.css")
_SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
_MONO_FONTS = ["ui-monospace", "Consolas", "monospace"]
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)


def build(
    backend: Backend,
    *,
    persona: str | None = None,
    options: Mapping[str, object] | None = None,
    name: str = "",
) -> gr.Blocks:
    """Make the page. Several visitors may chat at once, each with a conversation of their own.

    Args:
        backend: who replies; the page has a routing view if it is an `octavo.ui.local.LocalModel` of experts.
        persona: the shipped one that speaks at first; None for none.
        options: sampling options over the personas', as `SamplingParams.from_options` takes them.
        name: of the model, for the heading.

    Raises:
        OptionError: an option is unknown, or a value will not do.
        PersonaError: no such persona.
    """
    return _Page(backend, persona, options or {}, name).blocks


def mount(
    app: FastAPI,
    backend: Backend,
    path: str = "/ui",
    *,
    persona: str | None = None,
    options: Mapping[str, object] | None = None,
    name: str = "",
) -> None:
    """Put the page on an application that does not run yet. Who may come in is the application's to say.

    Nothing on the page is loaded from another host, and of Gradio's routes only those of a chat can be reached.

    Args:
        path: where; "/" for the whole application.
        persona, options, name: see `build`.

    Raises:
        OptionError, PersonaError: see `build`.
    """
    blocks = build(backend, persona=persona, options=options, name=name)
    theme = gr.themes.Default(font=_SYSTEM_FONTS, font_mono=_MONO_FONTS)
    if path != "/":  # a relative address, so that it is right behind a proxy too
        there = RedirectResponse(f"{path.rpartition('/')[2]}/")
        app.add_api_route(path, lambda: there, include_in_schema=False)
    gr.mount_gradio_app(
        app,
        blocks,
        path,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=_CSS.read_text(encoding="utf-8"),
    )
    mounted = app.router.routes[-1]
    assert isinstance(mounted, Mount)
    mounted.app = Guard(mounted.app)


def application(backend: Backend, **options: Any) -> FastAPI:
    """Make an application that is the page and nothing else; `options` are those of `mount`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mount(app, backend, "/", **options)
    return app


class _Page:
    """The components, and what happens when they are used."""

    def __init__(self, backend: Backend, persona: str | None, options: Mapping[str, object], name: str) -> None:
        self._backend = backend
        self._options = options
        self._context = getattr(backend, "context", None) or MOST_TOKENS
        self._n_layers = backend.n_layers if isinstance(backend, LocalModel) and backend.n_experts else 0
        self._personas = {one.lower(): Persona.load(one) for one in Persona.shipped()}
        chosen = NONE if persona is None else persona.lower()
        if chosen != NONE and chosen not in self._personas:
            Persona.load(chosen)
        self.blocks: gr.Blocks
        with gr.Blocks(title=f"Octavo: {name}" if name else "Octavo", analytics_enabled=False) as self.blocks:
            self._session = gr.State(Session(), delete_callback=Session.clear)
            gr.Markdown("# " + " · ".join(["Octavo", _literal(Path(name).name)] if name else ["Octavo"]))
            with gr.Row():
                with gr.Column(scale=3, min_width=280):
                    self._add_chat(chosen)
                    if self._n_layers:
                        self._add_view()
                with gr.Column(scale=1, min_width=280), gr.Accordion("Settings", open=True):
                    self._add_settings(chosen)
            self._add_events()
        self.blocks.queue(default_concurrency_limit=None, api_open=False)

    # ---------------------------------------- components

    def _add_chat(self, persona: str) -> None:
        self._chat = gr.Chatbot(
            label="Conversation",
            elem_id="octavo-chat",
            height="52vh",
            min_height=260,
            placeholder=self._greeting(persona),
            buttons=["copy"],
            layout="bubble",
            allow_tags=False,
            latex_delimiters=[],
            feedback_options=None,
        )
        self._status = gr.HTML(_status(""), elem_id="octavo-status")
        self._question = gr.Textbox(
            label="Your message",
            placeholder="Enter sends, Shift+Enter begins a new line",
            lines=1,
            max_lines=8,
            autofocus=True,
            elem_id="octavo-question",
        )
        with gr.Row(elem_classes="octavo-buttons"):
            self._send = gr.Button("Send", variant="primary", min_width=60, elem_id="octavo-send")
            self._stop = gr.Button("Stop", variant="stop", min_width=60, elem_id="octavo-stop")
            self._again = gr.Button("Regenerate", min_width=60, elem_id="octavo-again")
            self._clear = gr.Button("Clear", min_width=60, elem_id="octavo-clear")

    def _add_view(self) -> None:
        with gr.Accordion("Experts: who speaks", open=False, elem_id="octavo-experts") as self._accordion:
            self._layer = gr.Slider(
                1, max(self._n_layers, 2), value=1, step=1, label="Layer", elem_id="octavo-layer",
                interactive=self._n_layers > 1,
            )  # fmt: skip
            self._view = gr.HTML("", elem_id="octavo-view")

    def _add_settings(self, persona: str) -> None:
        names = [(one.name, key) for key, one in self._personas.items()]
        self._persona = gr.Radio([*names, (NONE, NONE)], value=persona, label="Persona", elem_id="octavo-persona")
        params, most = self._params(persona), min(MOST_TOKENS, self._context)
        self._system = gr.Textbox(
            self._system_of(persona), label="System prompt", lines=3, max_lines=8, elem_id="octavo-system"
        )
        self._sliders = [
            gr.Slider(0, max(2, params.temperature), params.temperature, step=0.05, label="Temperature"),
            gr.Slider(1, most, min(params.max_tokens or most, most), step=1, label="Max new tokens"),
            gr.Slider(0.05, 1, params.top_p, step=0.05, label="Top-p"),
            gr.Slider(
                min(0.5, params.repetition_penalty), max(2, params.repetition_penalty), params.repetition_penalty,
                step=0.05, label="Repetition penalty",
            ),
        ]  # fmt: skip

    # ---------------------------------------- events

    def _add_events(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        settings = [self._persona, self._system, *self._sliders]
        shown = [self._chat, self._status, self._question, *([self._view] if self._n_layers else [])]
        asked = [self._session, self._question, *settings]
        self._question.submit(self._on_send, asked, shown, **quiet)
        self._send.click(self._on_send, asked, shown, **quiet)
        self._again.click(self._on_again, [self._session, *settings], shown, **quiet)
        self._stop.click(Session.stop, [self._session], None, **quiet)
        for clear in (self._clear.click, self._chat.clear):  # the conversation has a bin of its own
            clear(self._on_clear, [self._session], shown, **quiet)
        become = [self._system, *self._sliders, self._chat]
        self._persona.input(self._on_persona, [self._persona], become, **quiet)
        if self._n_layers:
            self._accordion.expand(self._on_open, [self._session], [self._view], **quiet)
            self._accordion.collapse(self._on_close, [self._session], None, **quiet)
            self._layer.change(
                self._on_layer, [self._session, self._layer], [self._view], trigger_mode="always_last", **quiet
            )

    def _on_send(self, session: Session, question: str, persona: str, system: str, *values: float) -> Iterator[Any]:
        params = self._params(persona, values)
        for shown in session.reply(self._backend, question or "", system or "", params):
            yield self._updates(shown)

    def _on_again(self, session: Session, persona: str, system: str, *values: float) -> Iterator[Any]:
        params = self._params(persona, values)
        for shown in session.regenerate(self._backend, system or "", params):
            yield self._updates(shown)

    def _on_clear(self, session: Session) -> list[Any]:
        session.clear()
        return self._updates(Shown([], "", "", ""))

    def _on_persona(self, persona: str) -> list[Any]:
        params = self._params(persona)
        most = min(MOST_TOKENS, self._context)
        values = (params.temperature, min(params.max_tokens or most, most), params.top_p, params.repetition_penalty)
        return [self._system_of(persona), *values, gr.update(placeholder=self._greeting(persona))]

    def _on_open(self, session: Session) -> str:
        session.view_open = True
        return session.view()

    def _on_close(self, session: Session) -> None:
        session.view_open = False

    def _on_layer(self, session: Session, layer: float) -> str:
        session.layer = min(max(int(layer), 1), self._n_layers) - 1
        return session.view()

    # ---------------------------------------- what the components hold

    def _params(self, persona: str, values: tuple[float, ...] = ()) -> SamplingParams:
        """The persona's, then the options, then what the sliders say."""
        speaker = self._personas.get(persona)
        params = SamplingParams.from_options(speaker.sampling) if speaker else None
        params = SamplingParams.from_options(self._options, params)
        if values:
            temperature, max_tokens, top_p, penalty = values
            sliders = {
                "temperature": temperature,
                "max_tokens": int(max_tokens),
                "top_p": top_p,
                "repetition_penalty": penalty,
            }
            params = SamplingParams.from_options(sliders, params)
        return params

    def _system_of(self, persona: str) -> str:
        speaker = self._personas.get(persona)
        return speaker.system if speaker else ""

    def _greeting(self, persona: str) -> str:
        speaker = self._personas.get(persona)
        if speaker is None:
            return "Say something."
        words = GREETINGS.get(persona, f"{speaker.name}. Ask me something.")
        return f"### {_literal(words)}\n\n{_literal(speaker.description)}"

    def _updates(self, shown: Shown) -> list[Any]:
        question = gr.skip() if shown.question is None else shown.question
        updates = [[_message(turn) for turn in shown.turns], _status(shown.status), question]
        if self._n_layers:
            updates.append(gr.skip() if shown.routing is None else shown.routing)
        return updates


def _message(turn: Message) -> dict[str, str]:
    return {"role": turn.role, "content": _literal(turn.content)}


def _literal(text: str) -> str:
    """Markdown of a text whose HTML and images are shown as they are written; code is left to the renderer."""
    parts = _CODE.split(text)
    for at in range(0, len(parts), 2):
        parts[at] = parts[at].replace("&", "&amp;").replace("<", "&lt;").replace("![", "!\\[")
    return "".join(parts)


def _status(text: str) -> str:
    return f'<div class="octavo-status" role="status">{escape(text)}</div>'
