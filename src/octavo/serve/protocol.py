"""What clients of OpenAI's API send, as pydantic models: the types and ranges are checked here, and documented.

Fields that are not known here are ignored where they only tell the server something (user, metadata, store, ...);
those that ask for something else than text are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from octavo.sampling import MAX_CHOICES, MAX_LOGPROBS

MAX_STOPS = 16
MAX_PROMPTS = 128
DEFAULT_COMPLETION = 16  # tokens, as OpenAI's own server has it

_Number = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Model(BaseModel):
    """Types are taken as they are: the text "1" is no number, and true none either."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(_Model):
    """What a stream tells besides the reply."""

    include_usage: bool | None = None


class _Sampling(_Model):
    """What both kinds of request have in common."""

    model: Annotated[str, Field(description="The model's id, or a persona's: see /v1/models.")]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Annotated[_Number, Field(ge=0)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[_Number, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0, description="Octavo's own: keep the k likeliest tokens.")] | None = None
    min_p: Annotated[_Number, Field(ge=0, le=1, description="Octavo's own: see octavo.SamplingParams.")] | None = None
    repetition_penalty: Annotated[_Number, Field(ge=0.01, le=100, description="Octavo's own.")] | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true alone")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def options(self) -> dict[str, Any]:
        """The sampling options that were given, as `SamplingParams` names them."""
        names = ("n", "stop", "seed", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias")
        given = {name: getattr(self, name) for name in (*names, "max_tokens", "top_k", "min_p", "repetition_penalty")}
        return {name: value for name, value in given.items() if value is not None}


def _refuse(data: object, wrong: dict[str, str]) -> None:
    """Refuse fields that would change what is asked for, rather than reply to something else."""
    if isinstance(data, dict):
        for name, why in wrong.items():
            if data.get(name) not in (None, "", [], False):
                raise ValueError(f"{name} is not supported: {why}")


# ---------------------------------------- chat


class TextPart(_Model):
    """A part of a message: text is all that is read."""

    type: Literal["text"]
    text: str


class FunctionCall(_Model):
    """A call that the assistant made."""

    name: str
    arguments: Annotated[str, Field(description="JSON.")]


class ToolCall(_Model):
    """A call that the assistant made, with its id."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Model):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def as_read(self) -> dict[str, Any]:
        """As `octavo.chat.Message.of` takes it."""
        given = self.model_dump(exclude_none=True)
        given["role"] = "system" if self.role == "developer" else self.role
        return {"content": None, **given} if "tool_calls" not in given else given

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class JsonSchema(_Model):
    """A schema that a reply must satisfy."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None


class ResponseFormat(_Model):
    """What a reply must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    value: Annotated[
        dict[str, Any] | None, Field(description="A schema beside json_object, as huggingface_hub sends one.")
    ] = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs the field json_schema, with name and schema")
        return self


class Function(_Model):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Model):
    """A tool: functions are all there are."""

    type: Literal["function"]
    function: Function


class FunctionName(_Model):
    """A function by its name."""

    name: str


class NamedTool(_Model):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(_Sampling):
    """The body of a request for a chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_other_kinds(cls, data: object) -> object:
        _refuse(
            data,
            {
                "audio": "replies are text",
                "functions": "give them as tools",
                "function_call": "give it as tool_choice",
                "web_search_options": "there is no search",
            },
        )
        return data

    @model_validator(mode="after")
    def _logprobs_go_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def options(self) -> dict[str, Any]:
        """As the base's; logprobs are asked for in another way."""
        options = super().options()
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return options


# ---------------------------------------- completions


class CompletionRequest(_Sampling):
    """The body of a request for a completion of plain text or token ids."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_insertion(cls, data: object) -> object:
        _refuse(data, {"suffix": "text is only ever continued at its end"})
        return data

    @model_validator(mode="after")
    def _counts_go_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of must equal n, which is {self.n or 1}: every reply that is made is given")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"n times the number of prompts is more than {MAX_CHOICES}")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompt, or prompts, as a list."""
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if isinstance(prompt[0], int) else prompt

    def options(self) -> dict[str, Any]:
        """As the base's; a reply of no tokens is one whose token nobody is told."""
        options = super().options()
        options["max_tokens"] = max(1, DEFAULT_COMPLETION if self.max_tokens is None else self.max_tokens)
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
        return options


# ---------------------------------------- what comes back, for the document


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every refusal."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """A model, or a persona of one."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """Every name that `model` may have."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "draining"]
