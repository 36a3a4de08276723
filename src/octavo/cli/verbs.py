"""Groups of verbs, each a module that is imported when it is called for."""

from __future__ import annotations

import importlib
from keyword import iskeyword

import click


def lazy(package: str, *verbs: str) -> type[click.Group]:
    """A group that finds the verb `x` as `package.x.command`, so that nothing is imported for the others.

    Python's keywords have a `_` behind them as modules.
    """

    class Verbs(click.Group):
        def list_commands(self, ctx: click.Context) -> list[str]:
            return list(verbs)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in verbs:
                return None
            module = importlib.import_module(f"{package}.{cmd_name}{'_' if iskeyword(cmd_name) else ''}")
            command: click.Command = module.command
            return command

    return Verbs
