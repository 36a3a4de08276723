"""Options that verbs share, and what they stand for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from octavo.cli.terminal import note
from octavo.errors import OptionError, TokenizerError

if TYPE_CHECKING:
    from octavo.chat import Persona
    from octavo.llm import LLM
    from octavo.sampling import SamplingParams

GPU_MEMORY_HELP = "All that may be taken of the GPU, such as 24GiB: other experts lie in the host's memory."
F = TypeVar("F", bound=Callable[..., Any])
NO_PERSONA = "none"
BITS = ("8", "4", "3", "2")
SHAPE_BITS = ("16", *BITS)
LOADING = ("context", "trace", "prefetch")  # what -o takes besides sampling options: rare options of LLM.load
# Active parameters up to which one thread does all: the matrices are too small to share out, the other threads would
# only spin at every operation's end, and on a busy machine the first one would wait for them (20 times slower).
SMALL = 50_000_000
# What serving takes beside the process that `octavo.plan` counts; seen: 53 MB, and 175 MB with the page.
SERVER_BYTES, PAGE_BYTES = 64 << 20, 192 << 20


def model_options(command: F) -> F:
    """--model, --dtype, --device, --bits, --memory, --gpu-memory, --verbose."""
    for decorate in (
        click.option(
            "--verbose", "-v", is_flag=True, help="After a reply, say what was read of the experts, layer by layer."
        ),
        click.option("--gpu-memory", metavar="SIZE", help=GPU_MEMORY_HELP),
        click.option(
            "--memory", metavar="SIZE", help="All that may be taken, such as 12GiB: what does not fit is streamed."
        ),
        click.option(
            "--bits", type=click.Choice(BITS), metavar="N", help="8, 4, 3 or 2: quantise the weights while loading."
        ),
        click.option("--device", metavar="DEVICE", help="cpu, cuda, ...; by default a GPU if there is one."),
        click.option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; by default the weights' own."),
        click.option(
            "--model", "-m", metavar="M", help="A folder, weights file or Hub id; by default the model that ships."
        ),
    ):
        command = decorate(command)
    return command


def speaker_options(command: F) -> F:
    """--persona, --system, -o."""
    for decorate in (
        click.option(
            "--option", "-o", "pairs", multiple=True, metavar="KEY=VALUE",
            help="A sampling option, such as temperature=0, top_p=0.9, max_tokens=100, seed=1; or context=N and, with "
            "--memory, trace=FILE and prefetch=true. Repeatable.",
        ),
        click.option("--system", metavar="TEXT", help="System prompt, in the place of the persona's."),
        click.option(
            "--persona", "-p", metavar="NAME|FILE",
            help="Who speaks: a shipped persona, a TOML file, or none. The shipped model is menny by default.",
        ),
    ):  # fmt: skip
        command = decorate(command)
    return command


def parse_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """`-o key=value` as a dict; of a key given twice the last counts.

    Raises:
        OptionError: there is no "=" in one.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"-o {pair!r}: expected key=value", hint="such as -o temperature=0")
        options[key.strip()] = value
    return options


def take_loading(options: dict[str, str]) -> dict[str, Any]:
    """Take out of what -o says the options of `LLM.load`; what is left is for sampling.

    Raises:
        OptionError: a value that will not do, or a name that is nearly one of these.
    """
    for name in options.keys() - set(LOADING):
        if near := difflib.get_close_matches(name, LOADING, n=1, cutoff=0.7):
            raise OptionError(f"unknown option {name!r}", hint=f"did you mean {near[0]}?")
    found: dict[str, Any] = {name: options.pop(name) for name in LOADING if name in options}
    if "context" in found:
        if not found["context"].strip().isdecimal():
            raise OptionError(f"context is {found['context']!r}; expected an integer", hint="such as -o context=8192")
        found["context"] = int(found["context"])
    if found.get("trace") == "":
        raise OptionError("trace is empty; expected a file", hint="octavo routing trace records one")
    if "prefetch" in found:
        if found["prefetch"].lower() not in ("true", "false"):
            raise OptionError(f"prefetch is {found['prefetch']!r}; expected true or false", hint="-o prefetch=true")
        found["prefetch"] = found["prefetch"].lower() == "true"
    return found


def left_of(memory: str | None, taken: int) -> str | None:
    """What of a budget is left for the model beside something else.

    Raises:
        OptionError: nothing is, or it is no size.
    """
    from octavo.plan import parse_size, show_size

    if memory is None:
        return None
    left = parse_size(memory) - taken
    if left <= 0:
        raise OptionError(f"--memory {memory} is all taken by the server itself, {show_size(taken)}", hint="give more")
    return str(left)


def choose_persona(name: str | None, model: str | None) -> Persona | None:
    """The persona a name stands for; without a name, the shipped model's own.

    Raises:
        PersonaError: no such persona, or a file that cannot be used.
    """
    from octavo.chat import Persona
    from octavo.llm import SHIPPED

    if name is None and model in (None, SHIPPED):
        name = SHIPPED
    return None if name is None or name.lower() == NO_PERSONA else Persona.load(name)


def sampling(persona: Persona | None, options: dict[str, str]) -> SamplingParams:
    """The defaults, then the persona's, then what -o says.

    Raises:
        OptionError: an unknown option, or a value that will not do.
    """
    from octavo.sampling import SamplingParams

    base = SamplingParams.from_options(persona.sampling) if persona else None
    return SamplingParams.from_options(options, base)


def load(
    model: str | None,
    dtype: str | None,
    device: str | None,
    bits: str | None,
    memory: str | None,
    loading: dict[str, Any],
    gpu_memory: str | None = None,
) -> LLM:
    """Load the model a name stands for, by default the one that ships; say which kernels compute, and the plan.

    Args:
        loading: as `take_loading` returns it.
        gpu_memory: a budget of the card's memory.

    Raises:
        UserError: see `octavo.llm.LLM.load`.
    """
    from octavo.cli.memory import plan_line
    from octavo.kernels import backend, set_threads
    from octavo.llm import LLM, SHIPPED

    name = SHIPPED if model is None else model
    llm = LLM.load(name, dtype=dtype, device=device, bits=bits, memory=memory, gpu_memory=gpu_memory, **loading)
    if llm.tokenizer is None:
        raise TokenizerError(
            f"{name}: holds no tokenizer, and text needs one", hint="put tokenizer.model or tokenizer.json into it"
        )
    if llm.model.args.n_active_params < SMALL and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
        set_threads(1)
    if llm.uses_kernels:
        note(str(backend()))
    if llm.plan is not None:
        note(plan_line(llm.plan))
        idle = [name for name in ("trace", "prefetch") if loading.get(name)]
        if idle and llm.plan.placement is None:
            note(f"every expert is in memory: there is nothing for {' and '.join(idle)} to do")
    return llm
