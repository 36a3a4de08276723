"""Text in, text out: a model, its tokenizer and an engine behind `LLM.generate`, `stream` and `chat`."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard, overload

import torch

from octavo.budget import goes_on_card, left_for_model, nothing_to_read, plan_checkpoint, plan_checkpoint_on_card
from octavo.chat import ChatTemplate, Message, Persona, template_for
from octavo.checkpoint import open_checkpoint
from octavo.completion import Chunk, Completion, Prepared, Reply, Request, read_asked
from octavo.engine import Constraint, Engine, with_context
from octavo.errors import CheckpointError, HubError, OptionError, PromptError, TokenizerError
from octavo.experts import CacheCounters, ExpertCache, StreamedExperts, placement_from_trace
from octavo.hub import REPO_ID, snapshot
from octavo.kernels.memory import free_on_card
from octavo.kernels.modules import uses_kernels
from octavo.load import build_model
from octavo.model import Mixtral
from octavo.plan import MemoryPlan
from octavo.plan_card import CardPlan
from octavo.sampling import SamplingParams
from octavo.tokenizer import Tokenizer

__all__ = ["LLM", "Chunk", "Completion", "Conversation", "Prompt", "Stream", "find_model", "shipped_model"]

SHIPPED = "menny"
PREFIX_BYTES = 256 << 20
MAX_BATCH_SIZE = 8  # without a budget; within one it is 1, for every sequence's keys and values have their place in it
Prompt = str | Sequence[int]
Conversation = Sequence[Message | Mapping[str, str]]


class Stream(Iterator[Chunk]):
    """A reply as it comes. Iterate for chunks; close it, or leave its `with` block, to stop the model.

    Several streams of one `LLM` may be read in turn: each step of the engine serves them all.
    """

    def __init__(self, llm: LLM, request: Request) -> None:
        self._llm = llm
        self._request = request
        (self._reply,) = request.replies.values()
        self._shown_text = self._shown_ids = 0
        self._open = True

    def __next__(self) -> Chunk:
        if not self._open:
            raise StopIteration
        reply = self._reply
        try:
            while len(reply.text) == self._shown_text and reply.finish_reason is None:
                self._llm.step()
            self._request.raise_error()
        except BaseException:
            self.close()
            raise
        text, ids = reply.text[self._shown_text :], tuple(reply.token_ids[self._shown_ids :])
        logprobs = None if reply.logprobs is None else tuple(reply.logprobs[self._shown_ids :])
        self._shown_text, self._shown_ids = len(reply.text), len(reply.token_ids)
        if reply.finish_reason is None:
            return Chunk(text, ids, logprobs)
        self.close()
        request = self._request
        return Chunk(text, ids, logprobs, reply.finish_reason, request.usage(), request.timings())

    def close(self) -> None:
        """Stop generating. Nothing happens if the reply is finished or closed already."""
        if self._open:
            self._open = False
            self._llm.cancel(self._request)

    @property
    def result(self) -> Completion:
        """The whole reply, once the stream is read to its end; after an earlier close, what came before.

        Raises:
            RuntimeError: the stream is still open.
        """
        if self._open:
            raise RuntimeError("the reply is not finished: read the stream to its end, or close it")
        return self._request.completion()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):  # a stream dropped half-read must not go on generating
            self.close()


class LLM:
    """A language model to talk to. Not thread-safe.

    Args:
        model: in evaluation mode.
        tokenizer: None leaves token ids as the only way in, and no text comes out.
        eos_ids: ids that end every reply, besides the tokenizer's own end-of-text token.
        max_batch_size: sequences generated at a time; more wait.
        context: tokens of a sequence, where they are fewer than the model's.
        plan: what the model was placed by; `max_batch_size` and `context` are then the plan's.
        prefix_bytes: see `load`.
        whole_cache: see `load`; always with a plan.

    Attributes:
        plan: how the model runs within a budget, or on a card; None where it was loaded without one.
    """

    def __init__(
        self,
        model: Mixtral,
        tokenizer: Tokenizer | None,
        *,
        eos_ids: Iterable[int] = (),
        max_batch_size: int = MAX_BATCH_SIZE,
        context: int | None = None,
        plan: MemoryPlan | CardPlan | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        whole_cache: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        own = () if tokenizer is None or tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.eos_ids = frozenset((*own, *eos_ids))
        self.plan = plan
        if plan is not None:
            max_batch_size, context = plan.batch, plan.context
        self.engine = Engine(
            model,
            max_batch_size=max_batch_size,
            context=context,
            prefix_bytes=prefix_bytes,
            whole_cache=whole_cache or plan is not None,
        )
        caches = (getattr(module, "cache", None) for module in model.modules())
        self._expert_cache = next((cache for cache in caches if isinstance(cache, ExpertCache)), None)
        streamed = next((module for module in model.modules() if isinstance(module, StreamedExperts)), None)
        self._prefetch = None if streamed is None else streamed.prefetch
        self._requests: dict[int, Request] = {}  # those under way, by sequence

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        bits: int | str | None = None,
        max_batch_size: int | None = None,
        memory: str | int | None = None,
        gpu_memory: str | int | None = None,
        context: int | None = None,
        trace: str | Path | None = None,
        prefetch: bool = False,
        prefix_bytes: int | None = None,
        whole_cache: bool = False,
    ) -> LLM:
        """Load a model from where `find_model` finds it.

        With `memory`, what does not fit is left on the disk: of every expert a part stays in memory, and the rest is
        read when a token is routed to it. The replies are the same ones, token for token.

        On a CUDA device ("the card") bfloat16 and 8- or 4-bit weights are always planned: experts for which it has no
        room lie in the host's memory, with the same replies as on that card without a bound.

        Args:
            source: "menny" for the model that ships with Octavo, a folder or weights file in any layout that
                `octavo.open_checkpoint` reads, or a Hub id such as "owner/name".
            dtype: of weights and computation; by default the checkpoint's, and float32 for "menny", which is so small
                that a CPU computes faster in it.
            device: "cpu", "cuda", ...; by default a GPU if there is one that computes with such weights, but the CPU
                where `memory` is given and `gpu_memory` is not.
            revision: branch, tag or commit, for a Hub id.
            bits: 8, 4, 3 or 2 to quantise the weights while loading, which takes minutes for a large model:
                `octavo quantize` writes a store that opens at once.
            max_batch_size: sequences generated at a time; by default 8, and 1 with `memory`, or on a card that has no
                room for every expert beside them.
            memory: all that the process may take, such as "12GiB" or a number of bytes: weights, key-value cache,
                workspace and the process itself. The precision is the one it would be without: a lower one is for
                `bits` to ask for. With a card it bounds the host's memory; by default what is free.
            gpu_memory: all that the process may take of the card, as `memory`; by default what is free there.
            context: tokens of a sequence, prompt and reply together; by default the model's, and with a plan 4096 of
                them at most.
            trace: a record of which experts were used, by `octavo routing trace`: where it would have read less, the
                most used ones stay in memory whole. Needs `memory`; of no use where every expert fits, as `plan`
                tells.
            prefetch: read ahead what the next layer's router would choose now. As `trace`.
            prefix_bytes: keep so many bytes of keys and values of sequences that are over, for prompts that begin like
                these; by default 256 MiB, and none with `memory` or `gpu_memory`, of which they are a part.
            whole_cache: give the key-value cache all its address space at once, so that it never has to be copied to
                grow; on the CPU memory is still taken as it is used. Refused where so much is not free.

        Raises:
            OptionError: `memory` or `gpu_memory` is too little for this model, and the hint the smallest that works; or
                the options do not go together; or there is no such card.
            ResourceError: so much memory is not free.
            UserError: everything `find_model` and `load_model` raise.
        """
        if max_batch_size is not None and max_batch_size < 1:
            raise OptionError(f"max_batch_size is {max_batch_size}; expected an integer of at least 1")
        if prefix_bytes is not None and prefix_bytes < 0:
            raise OptionError(f"prefix_bytes is {prefix_bytes}; expected an integer of at least 0")
        bounded = memory is not None or gpu_memory is not None
        prefixes = prefix_bytes if prefix_bytes is not None else 0 if bounded else PREFIX_BYTES
        path = find_model(source, revision)
        checkpoint = open_checkpoint(path)
        if dtype is None and source == SHIPPED and gpu_memory is None:
            dtype = torch.float32
        plan: MemoryPlan | CardPlan | None = None
        on_card = goes_on_card(checkpoint, dtype=dtype, device=device, bits=bits, memory=memory, gpu_memory=gpu_memory)
        if (trace is not None or prefetch) and (memory is None or on_card):
            raise nothing_to_read("prefetch" if trace is None else "trace", on_card)
        if on_card:
            device = device or "cuda"
            plan = plan_checkpoint_on_card(
                checkpoint,
                None if gpu_memory is None else left_for_model("gpu_memory", gpu_memory, prefixes),
                memory,
                free=free_on_card(device) - prefixes,
                dtype=dtype,
                bits=bits,
                context=context,
                batch=max_batch_size,
                most=MAX_BATCH_SIZE,
            )
            if not checkpoint.is_store:
                checkpoint = open_checkpoint(path, mapped=False)
        elif memory is not None:
            batch, device = max_batch_size or 1, device or "cpu"
            budget = left_for_model("memory", memory, prefixes)
            plan = plan_checkpoint(
                checkpoint, budget, dtype=dtype, device=device, bits=bits, context=context, batch=batch
            )
            if plan.placement is not None:
                placement = plan.placement
                if trace is not None:
                    placement = placement_from_trace(Path(trace), plan)
                plan = dataclasses.replace(plan, placement=dataclasses.replace(placement, prefetch=prefetch))
            elif not checkpoint.is_store:  # what is converted must not stay mapped beside what it becomes
                checkpoint = open_checkpoint(path, mapped=False)
        elif context is not None:
            with_context(checkpoint.args, context)  # what is wrong should not wait for the weights
        if device is None and (checkpoint.is_store or bits is not None):
            device = "cpu"  # what no card computes with; for the others it is "cuda" by now
        tokenizer, eos_ids = checkpoint.tokenizer(), checkpoint.eos_ids
        placed = None if plan is None else plan.placement
        model = build_model(checkpoint, dtype=dtype, device=device, bits=bits, kernels=True, placement=placed)
        batch = MAX_BATCH_SIZE if max_batch_size is None else max_batch_size
        return cls(
            model,
            tokenizer,
            eos_ids=eos_ids,
            max_batch_size=batch,
            context=context,
            plan=plan,
            prefix_bytes=prefixes,
            whole_cache=whole_cache,
        )

    @property
    def context(self) -> int:
        """Tokens of a sequence, prompt and reply together."""
        return self.engine.context

    @property
    def experts(self) -> CacheCounters | None:
        """What was read of the experts so far, a view that goes on counting; None where they all stay in memory."""
        return None if self._expert_cache is None else self._expert_cache.counters

    @property
    def prefetch_note(self) -> str | None:
        """How prefetch fared, once that is decided; None before, and where nothing is prefetched."""
        return None if self._prefetch is None else self._prefetch.note

    @property
    def uses_kernels(self) -> bool:
        """Whether products are computed by `octavo.kernels`, on the CPU."""
        return uses_kernels(self.model)

    @property
    def converses(self) -> bool:
        """Whether the checkpoint says how to write a conversation: a template, or `[INST]` as a control token."""
        own = self.tokenizer
        return own is not None and (own.chat_template is not None or own.control_id("[INST]") is not None)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """How this checkpoint wants its conversations written."""
        return template_for(self._need_tokenizer("a conversation"))

    @overload
    def generate(self, prompt: str | list[int], params: SamplingParams | None = None, **options: Any) -> Completion: ...

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], params: SamplingParams | None = None, **options: Any
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """Continue one prompt, or several in one batch.

        Args:
            prompt: text, or a list of token ids (taken as they are, without BOS); or a list of such prompts.
            params: how to sample and when to stop; by default `SamplingParams()`.
            options: fields of `SamplingParams`, over `params`: `generate("Once", temperature=0)`.

        Returns:
            A completion, whose text goes on where the prompt ends; for a list of prompts a list, in its order.

        Raises:
            PromptError: a prompt is empty, too long for the context, or neither text nor ids.
            OptionError: an unknown option, or one out of range.
            TokenizerError: text, or stop strings, and no tokenizer.
        """
        params = SamplingParams.from_options(options, params)
        if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence) or _is_ids(prompt):
            return self._complete([prompt], params)[0]
        return self._complete(prompt, params)  # type: ignore[arg-type]  # _encode looks at each

    def stream(
        self,
        prompt: Prompt | Conversation,
        params: SamplingParams | None = None,
        *,
        persona: Persona | str | Path | None = None,
        **options: Any,
    ) -> Stream:
        """Like `generate` for text or token ids, like `chat` for messages; the reply comes in chunks.

        The request is checked and queued at once; generation goes on while the stream is read.

        Raises:
            UserError: what `generate` or `chat` raise; `n` other than 1; a persona without messages.
        """
        prepared = self.prepare(prompt, params, persona=persona, **options)
        if prepared.params.n != 1:
            raise OptionError(f"n is {prepared.params.n}; a stream gives one reply", "use generate or chat for several")
        return Stream(self, self.submit(prepared))

    def chat(
        self,
        messages: Conversation,
        params: SamplingParams | None = None,
        *,
        persona: Persona | str | Path | None = None,
        **options: Any,
    ) -> Completion:
        """Reply to a conversation.

        Args:
            messages: `Message`s or `{"role": ..., "content": ...}`, the user's last.
            params: how to sample and when to stop; by default the persona's defaults, then `SamplingParams()`'s.
            persona: one by name or file; its system prompt is used unless the messages bring one.
            options: fields of `SamplingParams`, over all of these.

        Raises:
            PromptError: the conversation is empty, out of turn, or too long for the context.
            OptionError: an unknown option, or one out of range.
            PersonaError: no such persona, or a file that cannot be used.
            TokenizerError: the model has no tokenizer.
        """
        ids, params, stop_ids = self._conversation(messages, params, persona, options)
        return self._finish([self.submit(self._checked(Prepared(ids, params, stop_ids, mid_text=False)))])[0]

    # ---------------------------------------- for those who serve many

    def prepare(
        self,
        prompt: Prompt | Conversation,
        params: SamplingParams | None = None,
        *,
        persona: Persona | str | Path | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        constraint: Callable[[], Constraint] | None = None,
        prompt_logprobs: int | None = None,
        **options: Any,
    ) -> Prepared:
        """Check and encode text, token ids or a conversation; from any thread, while others generate.

        Args:
            prompt: as `stream` takes it.
            params: how to sample and when to stop.
            persona: as for `chat`.
            tools: that the model may call, as the OpenAI API has them; for templates that know of tools.
            constraint: makes what each reply may consist of, such as `octavo.grammar.Grammar.json_object()`.
            prompt_logprobs: report the prompt's own log-probabilities, and the k likeliest tokens'.
            options: fields of `SamplingParams`, over `params`.

        Raises:
            UserError: what `stream` raises.
        """
        if isinstance(prompt, str) or _is_ids(prompt):
            if persona is not None or tools is not None:
                what = "a persona belongs" if persona is not None else "tools belong"
                raise PromptError(f"{what} to a conversation", "give messages, not text or ids")
            params = SamplingParams.from_options(options, params)
            ids, stop_ids, mid_text = self._encode(prompt), self.eos_ids, True
        else:
            ids, params, stop_ids = self._conversation(prompt, params, persona, options, tools)  # type: ignore[arg-type]
            mid_text = False
        return self._checked(Prepared(ids, params, stop_ids, mid_text, constraint, prompt_logprobs))

    def submit(self, prepared: Prepared) -> Request:
        """Queue what `prepare` made; `step` generates. This, `step` and `cancel` are for one thread."""
        params = prepared.params
        request = Request(len(prepared.ids), self.experts)
        try:
            for index in range(params.n):
                reply = Reply(self.tokenizer, params, mid_text=prepared.mid_text)
                seq_id = self.engine.add(
                    prepared.ids,
                    params,
                    stop_ids=prepared.stop_ids,
                    index=index,
                    constraint=None if prepared.constraint is None else prepared.constraint(),
                    prompt_logprobs=prepared.prompt_logprobs,
                )
                request.replies[seq_id], self._requests[seq_id] = reply, request
        except BaseException:
            self.cancel(request)
            raise
        return request

    def step(self) -> None:
        """One step of the engine, for everyone: each event goes to its reply."""
        if not self.engine.has_work:
            raise RuntimeError("a reply is waited for, but the engine has nothing to do")
        events, now = self.engine.step(), time.perf_counter()
        for event in events:
            request = self._requests.get(event.seq_id)
            if request is None:
                continue
            reply = request.replies[event.seq_id]
            reply.take(event, now)
            if reply.finish_reason is not None:
                request.count()
                del self._requests[event.seq_id]
                self.engine.cancel(event.seq_id)  # a stop string ends what the engine would go on with

    def cancel(self, request: Request) -> None:
        """Stop what of a request is still under way."""
        for seq_id in request.replies:
            self.engine.cancel(seq_id)
            if self._requests.pop(seq_id, None) is not None:
                request.count()

    # ---------------------------------------- from text to sequences

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                f"the model has no tokenizer, and {what} needs one",
                "put tokenizer.model or tokenizer.json into its folder, or give token ids",
            )
        return self.tokenizer

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer("text")
            if not prompt:
                raise PromptError("the prompt is empty", "give it at least a word to go on from")
            return tokenizer.encode(prompt, bos=tokenizer.adds_bos)
        if not _is_ids(prompt):
            raise PromptError(f"a prompt must be text or a list of token ids, found {type(prompt).__name__}")
        return [int(token_id) for token_id in prompt]

    def _conversation(
        self,
        messages: Conversation,
        params: SamplingParams | None,
        persona: Persona | str | Path | None,
        options: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], SamplingParams, frozenset[int]]:
        """Prompt ids, parameters and stop ids of a conversation."""
        turns, params = read_asked(messages, params, persona, options)
        ids = self.template.render(turns) if tools is None else self.template.render(turns, tools)
        return ids, params, self.eos_ids | frozenset(self.template.stop_ids)

    def _checked(self, prepared: Prepared) -> Prepared:
        if prepared.params.stop:
            self._need_tokenizer("a stop string")
        self.engine.check(prepared.ids, prepared.params)
        return prepared

    # ---------------------------------------- from sequences to text

    def _complete(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """Continue prompts; an error about one of several says which."""
        requests: list[Request] = []
        try:
            for prompt in prompts:
                prepared = Prepared(self._encode(prompt), params, self.eos_ids, mid_text=True)
                requests.append(self.submit(self._checked(prepared)))
        except BaseException as error:
            for request in requests:
                self.cancel(request)
            if isinstance(error, PromptError) and len(prompts) > 1:
                which = f"prompt {len(requests) + 1} of {len(prompts)}"
                raise PromptError(f"{which}: {error.message}", error.hint) from None
            raise
        return self._finish(requests)

    def _finish(self, requests: list[Request]) -> list[Completion]:
        """Step until all are done."""
        try:
            while not all(request.done for request in requests):
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        for request in requests:
            request.raise_error()
        return [request.completion() for request in requests]


def _is_ids(prompt: object) -> TypeGuard[Sequence[int]]:
    """Whether this is a list of token ids; an empty list is one, of an empty prompt."""
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        return False
    return all(isinstance(one, numbers.Integral) and not isinstance(one, bool) for one in prompt)


def shipped_model() -> Path:
    """Return the folder of the model that ships with Octavo.

    Raises:
        CheckpointError: this installation lacks it.
    """
    folder = Path(__file__).parent / "models" / SHIPPED
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: the model that ships with Octavo is not there",
            "install Octavo again, or give a model folder or a Hub id",
        )
    return folder


def find_model(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder (or weights file) a model's name stands for.

    "menny" is the shipped model; a folder that exists is itself; text of the form "owner/name" is looked up on the
    Hub and downloaded where it is not cached; anything else is taken for a folder. A `Path` is always a folder.

    Raises:
        CheckpointError: the shipped model is asked for and not there.
        HubError: no such repository, or the Hub cannot be reached.
    """
    if isinstance(source, str):
        if source == SHIPPED:
            return shipped_model()
        if REPO_ID.fullmatch(source) and not Path(source).is_dir():
            return _from_hub(source, revision)
    return Path(source).expanduser()


def _from_hub(repo_id: str, revision: str | None) -> Path:
    try:
        return snapshot(repo_id, revision=revision)
    except HubError as error:
        raise HubError(f"{error.message} (nor is there a folder {repo_id!r} here)", error.hint) from error
