"""Import this to have Triton's interpreter run the card's kernels three times as fast, where there is no GPU.

It prepares its language anew for every call of a function within a kernel, and looks for overflow in each sum.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

try:
    from triton.runtime import interpreter

    # Of its insides; where another version has others, it stays as slow as it is.
    _known = all(hasattr(interpreter, name) for name in ("_patch_lang", "InterpretedFunction", "interpreter_builder"))
except ImportError:  # no Triton: tests that need it say so
    _known = False

if _known and os.environ.get("TRITON_INTERPRET") == "1":
    _prepared: set[int] = set()

    def _call(function: Any, *args: Any, **options: Any) -> Any:
        namespace = id(function.fn.__globals__)
        if namespace not in _prepared:
            _prepared.add(namespace)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **options)

    interpreter.InterpretedFunction.__call__ = _call
    _builder = interpreter.interpreter_builder
    _builder.options = dataclasses.replace(_builder.options, sanitize_overflow=False)
