"""How requests end: as they should, by an error of the model, or because the server ends first."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence

from octavo.completion import Completion
from octavo.errors import UserError
from octavo.serve.errors import ApiError, of_user_error
from octavo.serve.gate import Visit
from octavo.serve.stream import event, updates
from octavo.serve.worker import Ticket

log = logging.getLogger("octavo.serve")
CUT_SHORT = "the server is shutting down, and the reply was not finished in time"


def failure(error: Exception) -> ApiError:
    """What ended a request, as the client is told; a line of the log says it too."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return of_user_error(error)
    log.error("a reply failed: %s: %s", type(error).__name__, " ".join(str(error).split())[:500])
    return ApiError(500, "the model failed at this reply", code="generation_failed")


def finished(ticket: Ticket) -> Completion:
    """The replies of a ticket that was read to its end.

    Raises:
        ApiError: they are not all there.
    """
    completion = ticket.result
    if any(choice.finish_reason == "cancelled" for choice in completion.choices):
        raise ApiError(503, CUT_SHORT, code="shutting_down", retry_after=10)
    return completion


async def read(tickets: Sequence[Ticket]) -> list[Completion]:
    """Wait for all replies.

    Raises:
        ApiError: they are not all there in the end.
    """
    try:
        async for _ in updates(tickets):
            pass
        return [finished(ticket) for ticket in tickets]
    except Exception as error:
        raise failure(error) from None


async def telling(
    chunks: AsyncGenerator[bytes, None], tickets: Sequence[Ticket], visit: Visit
) -> AsyncGenerator[bytes, None]:
    """Chunks as they come; what goes wrong is an event of its own, for the status was sent long before."""
    try:
        async for data in chunks:
            yield data
        for ticket in tickets:
            finished(ticket)
    except Exception as error:
        problem = failure(error)
        visit.failed, visit.note = True, f"; failed: {problem.code}"
        yield event(problem.body())
