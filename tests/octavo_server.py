"""Octavo's own server on 127.0.0.1, in a thread of the test's process, by its address alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from octavo.llm import LLM
from serve_fixtures import running


@contextlib.contextmanager
def serve(llm: LLM, **settings: Any) -> Iterator[str]:
    """Serve a model; gives the API's base address.

    Args:
        settings: of `ServeConfig`.
    """
    with running(llm, **({"model_id": "tiny"} | settings)) as one:
        yield one.url
