"""Octavo: sparse mixture-of-experts language models on the memory a person has.

>>> import octavo
>>> llm = octavo.LLM.load("menny")
>>> llm.chat([{"role": "user", "content": "Who are you?"}], temperature=0).text  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.args import ModelArgs, MoEArgs
    from octavo.chat import Message, Persona
    from octavo.checkpoint import open_checkpoint
    from octavo.errors import OctavoError, UserError
    from octavo.llm import LLM, Chunk, Completion
    from octavo.load import load_model
    from octavo.model import Mixtral
    from octavo.sampling import SamplingParams
    from octavo.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "LLM": "octavo.llm",
    "Chunk": "octavo.llm",
    "Completion": "octavo.llm",
    "Message": "octavo.chat",
    "Mixtral": "octavo.model",
    "ModelArgs": "octavo.args",
    "MoEArgs": "octavo.args",
    "OctavoError": "octavo.errors",
    "Persona": "octavo.chat",
    "SamplingParams": "octavo.sampling",
    "Tokenizer": "octavo.tokenizer",
    "UserError": "octavo.errors",
    "load_model": "octavo.load",
    "open_checkpoint": "octavo.checkpoint",
}
__all__ = [  # noqa: RUF022
    "LLM",
    "SamplingParams",
    "Completion",
    "Chunk",
    "Message",
    "Persona",
    "load_model",
    "open_checkpoint",
    "Mixtral",
    "ModelArgs",
    "MoEArgs",
    "Tokenizer",
    "OctavoError",
    "UserError",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import octavo` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
