"""The OpenAI-compatible API over a worker: routes, and how requests become tickets."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import octavo
from octavo.chat import Persona
from octavo.completion import Prepared
from octavo.errors import OptionError, UserError
from octavo.grammar import Grammar
from octavo.serve.chat import ChatReply
from octavo.serve.config import ServeConfig
from octavo.serve.errors import ApiError, of_user_error, of_validation
from octavo.serve.gate import GONE, Gate, Visit
from octavo.serve.metrics import Metrics
from octavo.serve.protocol import ChatRequest, CompletionRequest, ErrorBody, Health, ModelCard, ModelList
from octavo.serve.stream import ClientGoneError, EventStream, unless_gone
from octavo.serve.text import TextReply
from octavo.serve.worker import Draining, QueueFull, Ticket, Worker

T = TypeVar("T")
log = logging.getLogger("octavo.serve")
PREPARERS = 2  # threads that tokenise
DRAINING_RETRY = 10  # seconds after which another server is probably there

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request will not do; the message says why."},
    401: {"model": ErrorBody, "description": "No API key, or a wrong one."},
    403: {"model": ErrorBody, "description": "The Host header names another server."},
    404: {"model": ErrorBody, "description": "No such model."},
    408: {"model": ErrorBody, "description": "The body did not arrive in time."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    429: {"model": ErrorBody, "description": "Too many requests wait; Retry-After says how long to."},
    500: {"model": ErrorBody, "description": "The model failed."},
    503: {"model": ErrorBody, "description": "The server is shutting down, or short of memory."},
}
_READING: dict[int | str, dict[str, Any]] = {status: _REFUSALS[status] for status in (401, 403)}


def _reply_shape(kind: str) -> dict[int | str, dict[str, Any]]:
    schema = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": {"type": "object", "required": ["index", "finish_reason"]}},
            "usage": {"type": "object", "required": ["prompt_tokens", "completion_tokens", "total_tokens"]},
        },
    }
    content = {"application/json": {"schema": schema}, "text/event-stream": {}}
    return {**_REFUSALS, 200: {"description": "The reply; as events if stream is true.", "content": content}}


class _Server:
    """What the routes share."""

    def __init__(self, worker: Worker, config: ServeConfig) -> None:
        self.worker, self.config = worker, config
        self.started = int(time.time())
        self.draining = False  # whoever ends the server says so
        self.metrics = Metrics(worker)
        self.models: dict[str, Persona | None] = {config.model_id: None}
        self.models |= {name: Persona.load(name) for name in Persona.shipped()}
        self._pool = ThreadPoolExecutor(PREPARERS, thread_name_prefix="octavo-prepare")

    @functools.cached_property
    def _own_grammar(self) -> Grammar:
        llm = self.worker.llm
        if llm.tokenizer is None:
            raise OptionError("the model has no tokenizer, and JSON is text")
        return Grammar(llm.tokenizer, llm.model.args.vocab_size, llm.eos_ids | frozenset(llm.template.stop_ids))

    def grammar(self) -> Grammar:
        """What replies in JSON are made with: one for all requests, as it keeps what it has compiled."""
        return self._own_grammar

    async def off_the_loop(self, function: Callable[[], T]) -> T:
        """Compute what takes a while where it does not hold up other requests."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def persona(self, name: str) -> Persona | None:
        """Whose prompt and sampling defaults a model's name stands for.

        Raises:
            ApiError: there is no model of that name.
        """
        try:
            return self.models[name]
        except KeyError:
            names = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model {name[:100]!r}; here are {names}", param="model", code="model_not_found"
            ) from None

    def card(self, name: str) -> ModelCard:
        """What is said of a model."""
        self.persona(name)
        return ModelCard(id=name, created=self.started, owned_by="octavo")

    def submit(self, prepared: list[Prepared], visit: Visit) -> list[Ticket]:
        """Queue all prompts of a request, or none of them."""
        tickets: list[Ticket] = []
        try:
            for one in prepared:
                tickets.append(self.worker.submit(one, key=visit.key))
        except BaseException:
            _cancel(tickets)
            raise
        visit.prompt_tokens = sum(len(one.ids) for one in prepared)
        return tickets

    async def reply(self, request: Request, reply: ChatReply | TextReply) -> Response:
        """Prepare, queue, and answer: whole, or as a stream."""
        visit: Visit = request.scope["octavo"]
        prepared = await self.off_the_loop(reply.prepare)
        if self.config.log_prompts:
            log.info("asked: %r", reply.asked())
        tickets = self.submit(prepared, visit)
        if reply.streams:
            return EventStream(reply.events(tickets, visit), lambda: _close(tickets, visit))
        try:
            whole = await unless_gone(request.receive, reply.whole(tickets))
        except ClientGoneError:
            return Response(status_code=GONE)  # for the log: nobody reads it
        finally:
            _close(tickets, visit)
        return JSONResponse(whole)


def _cancel(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()


def _close(tickets: list[Ticket], visit: Visit) -> None:
    """End what is not over, and note how far it came."""
    if any(not ticket.over for ticket in tickets):
        _cancel(tickets)
        visit.note = visit.note or "; ended early"
    requests = [ticket.request for ticket in tickets if ticket.request is not None]
    visit.completion_tokens = sum(request.usage().completion_tokens for request in requests)


def create_app(worker: Worker, config: ServeConfig) -> FastAPI:
    """The API as an ASGI application.

    Args:
        worker: started by whoever stops it.
        config: settings; where to listen is not the application's business.
    """
    server = _Server(worker, config)
    app = FastAPI(
        title="Octavo",
        version=octavo.__version__,
        summary="Mixture-of-experts language models behind OpenAI's API.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.octavo = server
    app.add_middleware(Gate, config=config)
    if config.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    _add_refusals(app)
    _add_reading(app, server)
    _add_replies(app, server)
    _tell_the_truth(app, list(server.models), secured=bool(config.keys))
    return app


def _add_reading(app: FastAPI, server: _Server) -> None:
    @app.get("/v1/models", responses=_READING)
    async def list_models() -> ModelList:
        """Every name that a request's `model` may have."""
        return ModelList(data=[server.card(name) for name in server.models])

    @app.get("/v1/models/{model:path}", responses=_READING | {404: _REFUSALS[404]})
    async def get_model(model: str) -> ModelCard:
        """One of them."""
        return server.card(model)

    @app.get("/health", responses={503: {"model": Health, "description": "The server is shutting down."}})
    async def health(response: Response) -> Health:
        """Whether the server takes requests."""
        if server.draining:
            response.status_code = 503
            return Health(status="draining")
        return Health(status="ok")

    @app.get(
        "/metrics",
        response_class=Response,
        responses=_READING | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Counters and histograms, for Prometheus."""
        return Response(server.metrics.text(), headers={"Content-Type": server.metrics.content_type})


def _add_replies(app: FastAPI, server: _Server) -> None:
    @app.post("/v1/chat/completions", response_class=JSONResponse, responses=_reply_shape("chat.completion"))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Reply to a conversation."""
        persona = server.persona(body.model)
        return await server.reply(request, ChatReply(server.worker.llm, server.grammar, body, persona))

    @app.post("/v1/completions", response_class=JSONResponse, responses=_reply_shape("text_completion"))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on from text or token ids."""
        server.persona(body.model)
        return await server.reply(request, TextReply(server.worker.llm, body))

    @app.post("/v1/embeddings", response_class=JSONResponse, responses={**_READING, 400: _REFUSALS[400]})
    async def embeddings(body: Annotated[dict[str, Any] | None, Body()] = None) -> Response:
        """Refused: the models here write text, and give no embeddings."""
        message = "the models here write text and give no embeddings; ask /v1/chat/completions or /v1/completions"
        raise ApiError(400, message, param="model", code="unsupported_endpoint")


def _add_refusals(app: FastAPI) -> None:
    """Every error in the API's shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return of_user_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error.errors()).response()

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> Response:
        return ApiError(429, str(error), code="rate_limit_exceeded", retry_after=error.retry_after).response()

    @app.exception_handler(Draining)
    async def draining(request: Request, error: Draining) -> Response:
        return ApiError(503, str(error), code="shutting_down", retry_after=DRAINING_RETRY).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path[:100]}"
        messages = {404: f"there is no {where}", 405: f"there is no {where}; another method may do"}
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        message = messages.get(error.status_code, str(error.detail))
        code = codes.get(error.status_code)
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()


def _tell_the_truth(app: FastAPI, models: list[str], *, secured: bool) -> None:
    """Take FastAPI's own 422 out of the document, which is a 400 here, and put the models' names and the key in."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = plain()
            for operations in found["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(name, None)
            for name in ("ChatRequest", "CompletionRequest"):
                found["components"]["schemas"][name]["properties"]["model"]["enum"] = models
            if secured:
                found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                found["security"] = [{"key": []}]
                found["paths"]["/health"]["get"]["security"] = []
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's manual has it
