"""What clients may send, as pydantic models: OpenAI's fields, and vLLM's where OpenAI has none (top_k, lora_name).

A field that would change the answer and is not supported is here with the only values that change nothing (`n` 1, a
penalty of 0), and a field that is not here at all is refused: nothing a client sends is ignored, but for the few that
are about the client and not the answer. From these models FastAPI writes /openapi.json, so it says the same.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Zero = Annotated[float, Field(ge=0, le=0)] | None
One = Annotated[int, Field(ge=1, le=1)] | None
Nothing = Annotated[list[Any], Field(max_length=0)] | None
Empty = Annotated[dict[str, Any], Field(max_length=0)] | None
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Strict(BaseModel):
    """No unknown fields, and no value of another type made to fit."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def whole(cls, value: Any) -> Any:
        """2.0 is an integer to JSON, which knows one kind of number."""
        if isinstance(value, list):
            return [cls.whole(one) for one in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value


class Sampling(Strict):
    """How tokens are chosen and when an answer is over."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, description="-1 and 0: all tokens")] | None = None
    seed: Annotated[int, Field(ge=-(2**53), le=2**53)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None


class StreamOptions(Strict):
    """What a stream says besides the answer."""

    include_usage: bool | None = None


class OpenAI(Sampling):
    """What both of OpenAI's endpoints have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, description="default 1, as OpenAI's; 0 is greedy")] | None = None
    stream_options: StreamOptions | None = None
    # about the client, not the answer
    user: str | None = None
    # only what changes nothing
    n: One = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Empty = None


class Part(Strict):
    """A piece of a message: only text."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class Plain(Strict):
    """The format that every answer has."""

    type: Literal["text"]


class Chat(OpenAI):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: Plain | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class Completion(OpenAI):
    """POST /v1/completions: texts to go on with, or their token ids."""

    prompt: Text | Tokens | Annotated[list[Text] | list[Tokens], Field(min_length=1, max_length=64)]
    best_of: One = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None


class Generate(Sampling):
    """POST /generate: `ml.generate`, with its names and defaults (greedy)."""

    prompt: Text | Annotated[list[Message], Field(min_length=1)]
    adapter: Annotated[str, Field(description="null: the base")] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None


class Load(Strict):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    lora_path: Annotated[str, Field(min_length=1, description="inside the server's --adapter_folder")]


class Unload(Strict):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class ErrorBody(Strict):
    """What went wrong: OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Strict):
    """Every answer whose status is 400 or more."""

    error: ErrorBody
