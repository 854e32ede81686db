"""The request bodies, as pydantic models.

The fields are OpenAI's. Where OpenAI lacks a field, it is vLLM's (`top_k`, `lora_name`,
`chat_template_kwargs`). A field
that would change the answer and is not supported accepts only the values that change nothing: `n`
equal to 1, a penalty equal to 0. An unknown field is refused. So the server ignores no field,
except the few that describe the client and not the answer. FastAPI writes /openapi.json from these
models.

Source: https://platform.openai.com/docs/api-reference
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

# Fields that accept only the value that changes nothing.
Zero = Annotated[float, Field(ge=0, le=0)] | None
One = Annotated[int, Field(ge=1, le=1)] | None
EmptyList = Annotated[list[Any], Field(max_length=0)] | None
EmptyDict = Annotated[dict[str, Any], Field(max_length=0)] | None

PositiveInt = Annotated[int, Field(ge=1)] | None
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
# The limits stand at each kind of list: at a union of lists, the JSON schema would lack them.
Texts = Annotated[list[Text], Field(min_length=1, max_length=64)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1, max_length=64)]


class Strict(BaseModel):
    """A model that refuses unknown fields and converts no types, except 2.0 to the integer 2."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def convert_integers(cls, value: Any) -> Any:
        """Return a value whose integral floats are integers: JSON has one type of number.

        Args:
            value: the value of a field, before its validation.

        Returns:
            The converted value.
        """
        return _convert_integers(value)


def _convert_integers(value: Any) -> Any:
    """Return integral floats as integers, in nested lists too."""
    if isinstance(value, list):
        return [_convert_integers(element) for element in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


class Sampling(Strict):
    """The options for the choice of tokens and the end of an answer."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, description="-1 and 0: all tokens")] | None = None
    seed: Annotated[int, Field(ge=-(2**53), le=2**53)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None


class StreamOptions(Strict):
    """The additional contents of a stream."""

    include_usage: bool | None = None


class OpenAI(Sampling):
    """The fields that OpenAI's two endpoints share."""

    model: str
    max_tokens: PositiveInt = None
    temperature: (
        Annotated[float, Field(ge=0, le=2, description="default 1, as OpenAI's; 0 is greedy")]
        | None
    ) = None
    stream_options: StreamOptions | None = None
    # about the client, not the answer
    user: str | None = None
    # only values that change nothing
    n: One = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: EmptyDict = None


class Part(Strict):
    """A part of a message: only text is supported."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """Return the message in the form of chat templates, with its parts joined."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content}


class Plain(Strict):
    """The only supported format of an answer."""

    type: Literal["text"]


class Chat(OpenAI):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: PositiveInt = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: Plain | None = None
    tools: EmptyList = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class Completion(OpenAI):
    """The body of POST /v1/completions: texts to continue, or their token ids."""

    prompt: Text | TokenIds | Texts | TokenIdLists
    best_of: One = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None


class Generate(Sampling):
    """The body of POST /generate: `ml.generate` with its names and defaults (greedy)."""

    prompt: Text | Annotated[list[Message], Field(min_length=1)]
    chat_template_kwargs: dict[str, Any] | None = None
    adapter: Annotated[str, Field(description="null: the base")] | None = None
    max_new_tokens: PositiveInt = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None


class Load(Strict):
    """The body of POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    lora_path: Annotated[
        str, Field(min_length=1, description="a folder inside the server's --adapter_folder")
    ]


class Unload(Strict):
    """The body of POST /v1/unload_lora_adapter."""

    lora_name: str


class ErrorBody(Strict):
    """The fields of OpenAI's errors."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Strict):
    """The body of every response whose status is 400 or more."""

    error: ErrorBody
