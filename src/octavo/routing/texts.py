"""Texts to record the routing of: files of one's own, or the built-in ones of the shipped model's domains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import OptionError, PromptError, TokenizerError, UserError
from octavo.llm import LLM
from octavo.tokenizer import Tokenizer

# Each domain in a file of its name; recipes/menny/routing_texts.py writes them.
BUILT_IN = ("english", "french", "german", "spanish", "italian", "sums", "code")
_KINDS = 'a line is {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True)
class Document:
    """A text, or a conversation: one of the two.

    Attributes:
        text: plain text.
        messages: turns, as `octavo.chat.Message.of` takes them.
        label: what it is an example of, such as "french".
        name: where it is from, for messages about it.

    Raises:
        PromptError: it is neither a text nor a conversation, or both, or empty.
    """

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    label: str = "text"
    name: str = "the text"

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise PromptError(f"{self.name}: expected a text or messages, one of the two", _KINDS)
        if self.text is not None and not (isinstance(self.text, str) and self.text.strip()):
            raise PromptError(f"{self.name}: the text is empty, or no text", "give it at least a word")
        if self.messages is not None:
            of_turns = isinstance(self.messages, list | tuple) and all(isinstance(m, Mapping) for m in self.messages)
            if not (of_turns and self.messages):
                raise PromptError(f"{self.name}: messages must be a list of messages, one at least", _KINDS)


def read_documents(files: Sequence[str | Path], labels: Sequence[str] = ()) -> list[Document]:
    """Read texts.

    Args:
        files: .jsonl, a document a line, which holds text or messages; any other is a document as a whole.
        labels: one for each file and all its documents, or one for all files; by default the files' names without
            their endings.

    Raises:
        OptionError: there is not one label for each file, or a file that cannot be read.
        PromptError: a file is not UTF-8 or empty, or a line is not a document.
    """
    if len(labels) not in (0, 1, len(files)):
        raise OptionError(
            f"there are {len(labels)} labels for {len(files)} files",
            hint="give one for each, in their order, one for all, or none",
        )
    paths = [Path(file) for file in files]
    labels = [*labels] * len(paths) if len(labels) == 1 else labels
    found: list[Document] = []
    for path, label in zip(paths, labels or [path.stem for path in paths], strict=True):
        found += _read(path, label)
    return found


def built_in_documents() -> list[Document]:
    """Some 1,500 tokens of the shipped model for each of its domains.

    Stories, sums and functions are of content held out from its training; of the facts other phrasings were learnt.
    """
    folder = Path(__file__).parent / "texts"
    return read_documents([folder / f"{name}.jsonl" for name in BUILT_IN])


def encode(llm: LLM, document: Document) -> list[int]:
    """A document's token ids, with BOS where the model wants it; a conversation is written with its chat template.

    Where the model has none, a conversation's contents are put together, a blank line between them.

    Raises:
        PromptError: the chat template has no place for a conversation, or a message no text.
        TokenizerError: the model has no tokenizer.
    """
    try:
        return _encode(llm, tokenizer_for(llm), document)
    except UserError as error:
        raise type(error)(f"{document.name}: {error.message}", error.hint) from None


def tokenizer_for(llm: LLM) -> Tokenizer:
    """The model's tokenizer, or a TokenizerError."""
    if llm.tokenizer is None:
        raise TokenizerError(
            "the model has no tokenizer, and text needs one", "put tokenizer.model or tokenizer.json into its folder"
        )
    return llm.tokenizer


def _encode(llm: LLM, tokenizer: Tokenizer, document: Document) -> list[int]:
    messages = document.messages
    if messages is None:
        return tokenizer.encode(document.text or "", bos=tokenizer.adds_bos)
    if not llm.converses:
        contents = [message.get("content") for message in messages]
        if not all(isinstance(content, str) for content in contents):
            raise PromptError("a message has no content, or one that is no text", "the model has no chat template")
        return tokenizer.encode("\n\n".join(map(str, contents)), bos=tokenizer.adds_bos)
    if messages[-1].get("role") == "assistant":
        return llm.template.render_training(messages)[0]
    return llm.template.render(messages)


def _read(path: Path, label: str) -> list[Document]:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror})", hint="give a text file, or .jsonl") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise PromptError(
            f"{path}: not valid UTF-8 (byte {error.start} is 0x{byte:02x})",
            "convert it first, such as with iconv -f latin1 -t utf-8",
        ) from None
    if path.suffix != ".jsonl":
        return [Document(text=content, label=label, name=str(path))]
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not lines:
        raise PromptError(f"{path}: holds no document", _KINDS)
    return [_document(line, label, f"{path}, line {number}") for number, line in lines]


def _document(line: str, label: str, name: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name}: not JSON ({error})", _KINDS) from None
    if not isinstance(row, dict):
        raise PromptError(f"{name}: expected a JSON object", _KINDS)
    return Document(row.get("text"), row.get("messages"), label, name)
