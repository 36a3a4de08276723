"""Refusals in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from octavo.errors import ResourceError, UserError

BAD_REQUEST = "invalid_request_error"
_TYPES = {
    401: "authentication_error",
    404: BAD_REQUEST,
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request that gets no reply but this.

    Args:
        status: of HTTP.
        message: what is wrong, and what was expected.
        param: the field of the request that is to blame.
        code: a word for programs.
        retry_after: seconds after which it is worth another try.
        headers: more of the response's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        kind = _TYPES.get(self.status, BAD_REQUEST)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As HTTP has it."""
        return JSONResponse(self.body(), self.status, self.headers)


def of_user_error(error: UserError, param: str | None = None) -> ApiError:
    """What a request asked for and cannot have; memory that is gone is no fault of the request's."""
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    if isinstance(error, ResourceError):
        return ApiError(503, message, code="out_of_memory", retry_after=10)
    return ApiError(400, message, param=param)


def of_validation(errors: Sequence[Any]) -> ApiError:
    """The first thing pydantic found, without what was sent: that may be long, or nobody's business."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(
            400, f"the body is not valid JSON: {reason} at character {first['loc'][-1]}", code="invalid_json"
        )
    # pydantic names the members of a union too: they are no part of the request
    param = ".".join(part for part in where if not part.endswith("]") and not part[:1].isupper()) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else f"the body will not do: {message}", param=param)
