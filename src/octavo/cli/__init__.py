"""The command line: `octavo VERB`. One module per verb, imported when it is called for.

stdout is data, stderr is progress and logs. Exit codes: 0 done, 1 bad input (one line that says what is wrong, and
a hint), 2 a command line that cannot be read, 130 interrupted. A traceback is a bug.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

import octavo
from octavo.cli.terminal import INTERRUPTED, tell_error
from octavo.cli.verbs import lazy
from octavo.errors import UserError

VERBS = ("chat", "ui", "generate", "serve", "plan", "tensors", "convert", "quantize", "bench", "train", "routing")


@click.group(
    cls=lazy("octavo.cli", *VERBS), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(octavo.__version__, "-V", "--version", prog_name="octavo", message="%(prog)s %(version)s")
def octavo_command() -> None:
    """Sparse mixture-of-experts language models on the memory you have.

    \b
    octavo chat                        talk to the model that ships with Octavo
    octavo ui                          the same on a page in the browser
    octavo generate "Who are you?"     one reply on stdout
    octavo serve                       serve it to clients of the OpenAI API
    octavo plan MODEL                  say whether it fits this machine, how it runs, how fast
    octavo tensors MODEL               list the tensors of a checkpoint, here or on the Hub
    octavo convert SRC DST --to hf     write a checkpoint in another layout
    octavo quantize SRC DST --bits 4   write it in 8, 4, 3 or 2 bits, for the CPU
    octavo bench --shape mixtral-8x7b  measure how fast this machine runs a model
    octavo train CONFIG.toml           train a model from scratch
    octavo routing report MODEL        look inside: who is routed where, how experts differ
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        args: without the program's name; by default those of the process.
    """
    sys.exit(_run(args))


def _run(args: Sequence[str] | None) -> int:
    _write_any_character()
    try:
        code = octavo_command.main(args, prog_name="octavo", standalone_mode=False)
    except UserError as error:
        tell_error(error)
        return 1
    except click.Abort:  # Ctrl-C; click has ended the line already
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return code if isinstance(code, int) else 0


def _write_any_character() -> None:
    """Where the terminal's encoding lacks a character, write a question mark instead of failing."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # absent where stdout is something else's buffer
    if reconfigure is not None:
        reconfigure(errors="replace")
