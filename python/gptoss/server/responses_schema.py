"""What clients may send to POST /v1/responses, and the conversation that it means.

Input items become messages as /v1/chat/completions has them: reasoning, a text and function calls
that follow each other are one turn of the assistant.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from ..sampling import MAX_LOGPROBS
from .errors import ApiError, invalid
from .schemas import MAX_MESSAGES, MAX_TOOLS, Count, Ignored, Sampling, Streamed, Strict

LOGPROBS = "message.output_text.logprobs"
_MAX_METADATA = 16
# In one turn reasoning comes first, then a text, then calls: what a turn must not have yet.
_NOT_BEFORE = {
    "reasoning": ("reasoning", "content", "tool_calls"),
    "content": ("content", "tool_calls"),
    "tool_calls": (),
}
_NOT_KEPT = "this server keeps no responses: send the items of the conversation as input"


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_optional_parts(value: Any) -> Any:
    return [] if value is None else _as_parts(value)


class Part(Strict):
    """A piece of text in an item."""

    type: Literal["text", "input_text", "output_text", "reasoning_text", "summary_text"]
    text: str


FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
_PartList = Annotated[list[Part], Field(fail_fast=True, max_length=MAX_MESSAGES)]
Parts = Annotated[_PartList, BeforeValidator(_as_parts)]
OptionalParts = Annotated[_PartList, BeforeValidator(_as_optional_parts)]


class MessageItem(Strict):
    """What somebody said. Its type may be left out."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class ReasoningItem(Strict):
    """What the assistant thought, as this server sent it. A summary stands in for lost content."""

    summary: OptionalParts = Field(default_factory=list)
    content: OptionalParts = Field(default_factory=list)


class FunctionCallItem(Strict):
    """A call the assistant made."""

    call_id: Annotated[str, Field(min_length=1)]
    name: FunctionName
    arguments: str


class FunctionOutputItem(Strict):
    """What the function returned."""

    call_id: str
    output: Parts


_ITEMS: dict[str, type[BaseModel]] = {
    "message": MessageItem,
    "reasoning": ReasoningItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
}


class Reasoning(Strict):
    """How much to think."""

    effort: Literal["low", "medium", "high"] | None = None
    summary: str | None = None  # ignored: the reasoning itself is there, and nobody sums it up
    generate_summary: str | None = None  # ignored, likewise


class TextFormat(Strict):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    def response_format(self) -> dict[str, Any]:
        """The same as chat completions have it."""
        if self.type != "json_schema":
            return {"type": self.type}
        fields = self.echo()
        del fields["type"]
        return {"type": self.type, "json_schema": fields}

    def echo(self) -> dict[str, Any]:
        """As the response repeats it."""
        return self.model_dump(by_alias=True, exclude_none=True)


class Text(Strict):
    """Settings of the text."""

    format: TextFormat | None = None
    verbosity: str | None = None  # ignored


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def chat_tool(self) -> dict[str, Any]:
        """The same as chat completions have it."""
        fields = self.model_dump(exclude={"type"}, exclude_none=True)
        return {"type": "function", "function": fields}


class ResponsesRequest(Sampling, Streamed, Ignored):
    """Body of POST /v1/responses."""

    include: list[Literal[LOGPROBS, "reasoning.encrypted_content"]] | None = None
    input: Annotated[
        Annotated[
            list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
        ],
        BeforeValidator(_as_items),
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    max_tool_calls: int | None = None  # ignored: of tools that run on the server
    metadata: Annotated[dict[str, str], Field(max_length=_MAX_METADATA)] | None = None
    parallel_tool_calls: bool | None = None  # the format makes one call a turn
    reasoning: Reasoning | None = None
    text: Text | None = None
    tool_choice: Any = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncation: Literal["disabled"] | None = None
    # What would change the answer and is not there.
    background: bool | None = None
    conversation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.previous_response_id is not None:
            raise ValueError(f"previous_response_id is not supported: {_NOT_KEPT}")
        if self.conversation is not None:
            raise ValueError(f"conversation is not supported: {_NOT_KEPT}")
        if self.background:
            raise ValueError("background is not supported: this server keeps no responses")
        if self.prompt is not None:
            raise ValueError("prompt is not supported: this server has no prompt templates")
        return self

    @property
    def logprobs(self) -> int | None:
        """How many likeliest tokens to tell at each place of the text; None for nothing at all."""
        wanted = self.top_logprobs is not None or LOGPROBS in (self.include or ())
        return self.top_logprobs or 0 if wanted else None

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat completions have it.

        Raises:
            ApiError: 400, naming the item and its field.
        """
        conversation = _Conversation()
        if self.instructions is not None:
            conversation.add_message("developer", self.instructions)
        for index, item in enumerate(self.input):
            conversation.add(f"input[{index}]", item)
        return conversation.messages

    def chat_tools(self) -> list[dict[str, Any]]:
        """The tools as chat completions have them."""
        return [tool.chat_tool() for tool in self.tools or ()]

    def chat_tool_choice(self) -> Any:
        """The choice of a tool as chat completions have it."""
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "function":
            return {"type": "function", "function": {"name": choice.get("name")}}
        return "auto" if choice is None else choice

    def text_format(self) -> TextFormat:
        """What the answer must look like: text, unless it says otherwise."""
        given = self.text.format if self.text is not None else None
        return given or TextFormat(type="text")


class _Conversation:
    """Messages, from one item after the other."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._calls: set[str] = set()

    def add(self, where: str, item: dict[str, Any]) -> None:
        """The next item. `where`: its place in the request, for errors."""
        kind = item.get("type", "message")
        model = _ITEMS.get(kind) if isinstance(kind, str) else None
        if model is None:
            kinds = ", ".join(_ITEMS)
            raise ApiError(
                400, f"{where}.type: {str(kind)[:64]!r} is none of {kinds}", param="input"
            )
        try:
            checked = model.model_validate(item)
        except ValidationError as error:
            raise ApiError(400, f"{where}.{invalid(error).message}", param="input") from None
        match checked:
            case MessageItem(role=role, content=content):
                self.add_message(role, _joined(content))
            case ReasoningItem(content=content, summary=summary):
                self._assistant("reasoning")["reasoning"] = _joined(content or summary)
            case FunctionCallItem():
                self._add_call(checked)
            case FunctionOutputItem(call_id=call_id, output=output):
                if call_id not in self._calls:
                    raise ApiError(
                        400,
                        f"{where}.call_id: {call_id[:64]!r} is no function call before it",
                        param="input",
                    )
                self.messages.append(
                    {"role": "tool", "tool_call_id": call_id, "content": _joined(output)}
                )

    def add_message(self, role: str, content: str) -> None:
        """A message of anybody."""
        if role == "assistant":
            self._assistant("content")["content"] = content
        else:
            self.messages.append({"role": role, "content": content})

    def _add_call(self, item: FunctionCallItem) -> None:
        self._calls.add(item.call_id)
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        self._assistant("tool_calls").setdefault("tool_calls", []).append(call)

    def _assistant(self, field: str) -> dict[str, Any]:
        """The assistant's turn that `field` goes to: the last message, or a new one where that is
        another's, or has something that comes behind `field`."""
        last = self.messages[-1] if self.messages else {"role": ""}
        full = any(name in last for name in _NOT_BEFORE[field])
        if last["role"] != "assistant" or full:
            self.messages.append({"role": "assistant"})
        return self.messages[-1]


def _joined(parts: list[Part]) -> str:
    return "".join([part.text for part in parts])
