"""The exceptions Octavo raises on purpose.

    OctavoError
    └── UserError            bad input: a message that names the culprit, and a hint at the mend
        ├── OptionError      an option or sampling parameter out of range, unknown or misspelt
        ├── ConfigError      config.json, a training TOML: a key missing, misplaced or nonsensical
        ├── CheckpointError  weights: absent, truncated, misshapen, unknown
        ├── TokenizerError   tokenizer files
        ├── PromptError      empty, too long for the context, not valid UTF-8
        ├── PersonaError     a persona file that cannot be used
        ├── ResourceError    memory or disk that was counted on is not free
        └── HubError         the Hub said no, or could not be reached

Anything else that escapes is a bug in Octavo.
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base of every exception Octavo raises on purpose."""


class UserError(OctavoError):
    """Bad input, said in one line.

    Args:
        message: names the file, tensor, option or value, and what was expected of it.
        hint: how to mend it, shown as `hint: ...` below the message.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class OptionError(UserError):
    """An option or sampling parameter is unknown or out of range."""


class ConfigError(UserError):
    """A configuration file lacks a key, or holds one that makes no sense."""


class CheckpointError(UserError):
    """Weights are absent, truncated, misshapen or unknown."""


class TokenizerError(UserError):
    """A tokenizer file cannot be read, or cannot do what was asked."""


class PromptError(UserError):
    """A prompt is empty, too long or not text."""


class PersonaError(UserError):
    """A persona file cannot be used."""


class ResourceError(UserError):
    """Memory or disk that was counted on is not free."""


class HubError(UserError):
    """The Hub refused, or could not be reached."""
