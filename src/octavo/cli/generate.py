"""`octavo generate`: one prompt, one reply on stdout."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.options import (
    choose_persona,
    load,
    model_options,
    parse_pairs,
    sampling,
    speaker_options,
    take_loading,
)
from octavo.cli.terminal import note, read_stdin, show, stdin_is_terminal
from octavo.errors import OptionError, PromptError

if TYPE_CHECKING:
    from octavo.llm import LLM, Completion
    from octavo.sampling import SamplingParams


@click.command("generate")
@click.argument("prompt", required=False)
@model_options
@speaker_options
@click.option("--raw", is_flag=True, help="Complete PROMPT as plain text, not as a question to a chat model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, token ids, usage, timings, memory.")
def command(
    prompt: str | None,
    model: str | None,
    dtype: str | None,
    device: str | None,
    bits: str | None,
    memory: str | None,
    gpu_memory: str | None,
    verbose: bool,
    persona: str | None,
    system: str | None,
    pairs: tuple[str, ...],
    raw: bool,
    as_json: bool,
) -> None:
    """Reply to PROMPT, which is read from stdin if it is "-" or left out.

    A chat model (one whose folder brings a chat template or chat control tokens) answers PROMPT as one turn of a
    conversation. Any other model, or any model with --raw, goes on from PROMPT as from plain text.

    \b
    octavo generate "Combien font 7 et 5 ?"
    octavo generate --model ./mixtral --raw "Once upon a time" -o temperature=0 -o max_tokens=40
    echo "Who are you?" | octavo generate --json
    """
    if raw and (system is not None or persona is not None):
        raise OptionError(
            "--raw completes plain text, in which --system and --persona have no place", hint="leave one side out"
        )
    text = _prompt(prompt)
    speaker = None if raw else choose_persona(persona, model)
    options = parse_pairs(pairs)
    loading = take_loading(options)
    params = sampling(speaker, options)
    if not as_json:
        _check_plain(params)
    llm = load(model, dtype, device, bits, memory, loading, gpu_memory)
    if not raw and not (speaker or system is not None or llm.converses):
        note("the model has no chat template: PROMPT is completed as plain text (--raw says so silently)")
        raw = True
    if system is None and speaker is not None:
        system = speaker.system
    turns = [{"role": "system", "content": system}] if system else []
    conversation = None if raw else [*turns, {"role": "user", "content": text}]
    completion = _answer(llm, text, conversation, params, as_json=as_json)
    if verbose:
        from octavo.cli.memory import tell_experts

        tell_experts(completion.experts)
    if llm.prefetch_note:
        note(llm.prefetch_note)


def _prompt(argument: str | None) -> str:
    """The prompt from the command line or from stdin, without the newline that ends a file."""
    if argument is not None and argument != "-":
        text = argument
    elif argument is None and stdin_is_terminal():
        raise PromptError("there is no prompt", hint='give it: octavo generate "Who are you?", or pipe it in')
    else:
        text = read_stdin().removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise PromptError("the prompt is empty", hint="give at least a word")
    return text


def _check_plain(params: SamplingParams) -> None:
    """Refuse what plain text cannot show, rather than leave it out."""
    for name, asked in (("n", params.n != 1), ("logprobs", params.logprobs is not None)):
        if asked:
            raise OptionError(f"{name} is {getattr(params, name)}; plain text has no place for it", hint="add --json")


def _answer(
    llm: LLM, text: str, conversation: list[dict[str, str]] | None, params: SamplingParams, *, as_json: bool
) -> Completion:
    if as_json:
        completion = llm.chat(conversation, params) if conversation else llm.generate(text, params)
        click.echo(json.dumps(_to_dict(llm, completion)))
        return completion
    try:
        with llm.stream(conversation or text, params) as stream:
            for chunk in stream:
                show(chunk.text)
    finally:
        show("\n")
    return stream.result


def _to_dict(llm: LLM, completion: Completion) -> dict[str, Any]:
    """The completion's own; where there is a budget, with what came of it."""
    said = completion.to_dict()
    if llm.plan is None:
        return said
    from octavo.cli.memory import budget_to_json, plan_to_json

    plan = {**budget_to_json(llm.plan), **plan_to_json(llm.plan)}
    cache = said.pop("experts")
    return said | {"memory": {"plan": plan, "cache": cache, "prefetch": llm.prefetch_note}}
