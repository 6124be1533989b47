"""Output items of a response, made from what the model writes, and the events that tell of them.

response.output_item.added
  response.content_part.added                   (not for function calls)
    response.reasoning_text.delta ... .done     or output_text, or function_call_arguments
  response.content_part.done
response.output_item.done
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..harmony import Delta

Event = dict[str, Any]
Logprob = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class Output:
    """Takes the deltas of an answer; gives each one's events, without their sequence numbers."""

    def __init__(self) -> None:
        self._items: list[_Item] = []
        self._open: _Item | None = None

    def add(self, delta: Delta, logprobs: Sequence[Logprob] = ()) -> Iterator[Event]:
        """A piece of an answer. A new kind of text, and every call, is a new item."""
        text = delta.text
        if self._open is None or delta.name is not None or delta.kind != self._open.kind:
            yield from self.close("completed")
            if delta.kind != "tool_call" and any(item.kind == delta.kind for item in self._items):
                text = text.removeprefix("\n\n")  # which set it apart from the last of its kind
            self._open = _new_item(len(self._items), delta)
            self._items.append(self._open)
            yield from self._open.opened()
        if text:
            yield self._open.more(text, logprobs)

    def close(self, status: ItemStatus) -> Iterator[Event]:
        """The item under way, if there is one, is over."""
        if self._open is not None:
            yield from self._open.closed(status)
            self._open = None

    def json(self) -> list[dict[str, Any]]:
        """The items as they are now."""
        return [item.json() for item in self._items]


class _Item:
    """One item in the making. Subclasses say what it looks like."""

    prefix: str  # of its id
    event: str  # name of the events of its text

    def __init__(self, index: int, delta: Delta) -> None:
        self.kind = delta.kind
        self.id = new_id(self.prefix)
        self._index = index
        self._status: ItemStatus = "in_progress"
        self._texts: list[str] = []

    def json(self) -> dict[str, Any]:
        """The item as it is now."""
        raise NotImplementedError

    def opened(self) -> Iterator[Event]:
        """Events of its beginning."""
        yield {
            "type": "response.output_item.added",
            "output_index": self._index,
            "item": self.json(),
        }

    def more(self, text: str, logprobs: Sequence[Logprob]) -> Event:
        """The event of one more piece of text."""
        self._texts.append(text)
        return {"type": f"{self.event}.delta", **self._place(), "delta": text}

    def closed(self, status: ItemStatus) -> Iterator[Event]:
        """Events of its end."""
        self._status = status
        yield {
            "type": "response.output_item.done",
            "output_index": self._index,
            "item": self.json(),
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self._index}

    def _text(self) -> str:
        return "".join(self._texts)


class _TextItem(_Item):
    """An item whose content is one part: some text."""

    def _part(self) -> dict[str, Any]:
        raise NotImplementedError

    def _place(self) -> dict[str, Any]:
        return {**super()._place(), "content_index": 0}

    def _content(self) -> list[dict[str, Any]]:
        return [self._part()] if self._texts else []

    def opened(self) -> Iterator[Event]:
        yield from super().opened()
        yield {"type": "response.content_part.added", **self._place(), "part": self._part()}

    def closed(self, status: ItemStatus) -> Iterator[Event]:
        yield {"type": f"{self.event}.done", **self._place(), "text": self._text()}
        yield {"type": "response.content_part.done", **self._place(), "part": self._part()}
        yield from super().closed(status)


class _ReasoningItem(_TextItem):
    prefix = "rs"
    event = "response.reasoning_text"

    def json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "reasoning",
            "summary": [],
            "content": self._content(),
            "encrypted_content": None,
            "status": self._status,
        }

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self._text()}


class _MessageItem(_TextItem):
    prefix = "msg"
    event = "response.output_text"

    def __init__(self, index: int, delta: Delta) -> None:
        super().__init__(index, delta)
        self._logprobs: list[Logprob] = []

    def json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": self._content(),
            "status": self._status,
        }

    def _part(self) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": self._text(),
            "annotations": [],
            "logprobs": list(self._logprobs),
        }

    def more(self, text: str, logprobs: Sequence[Logprob]) -> Event:
        self._logprobs += logprobs
        return {**super().more(text, logprobs), "logprobs": list(logprobs)}

    def closed(self, status: ItemStatus) -> Iterator[Event]:
        for event in super().closed(status):
            done = event["type"] == f"{self.event}.done"
            yield {**event, "logprobs": list(self._logprobs)} if done else event


class _CallItem(_Item):
    prefix = "fc"
    event = "response.function_call_arguments"

    def __init__(self, index: int, delta: Delta) -> None:
        super().__init__(index, delta)
        self._name = delta.name
        self._call_id = delta.id

    def json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self._text(),
            "status": self._status,
        }

    def closed(self, status: ItemStatus) -> Iterator[Event]:
        yield {
            "type": f"{self.event}.done",
            **self._place(),
            "name": self._name,
            "arguments": self._text(),
        }
        yield from super().closed(status)


def _new_item(index: int, delta: Delta) -> _Item:
    kinds = {"reasoning": _ReasoningItem, "content": _MessageItem, "tool_call": _CallItem}
    return kinds[delta.kind](index, delta)


def new_id(prefix: str) -> str:
    """An id like OpenAI's."""
    return f"{prefix}_{secrets.token_hex(24)}"
