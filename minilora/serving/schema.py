"""The request bodies, as pydantic models.

The fields are OpenAI's. Where OpenAI lacks a field, it is vLLM's (`top_k`, `lora_name`,
`chat_template_kwargs`). The server ignores no field that would change an answer:

    a field of these models         is validated, and has its effect
    any other field, with a value   is accepted and left out: null, [], {}, "auto", and the values
    that changes nothing            of NEUTRAL
    any other field                 is refused with status 400

So a client may send back whatever the server sent (`refusal`, null, in a message). FastAPI writes
/openapi.json from these models.

Source: https://platform.openai.com/docs/api-reference
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(ge=1)] | None
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
# The limits stand at each kind of list: at a union of lists, the JSON schema would lack them.
Texts = Annotated[list[Text], Field(min_length=1, max_length=64)]
TokenIdLists = Annotated[list[TokenIds], Field(min_length=1, max_length=64)]
Penalty = Annotated[float, Field(ge=-2, le=2)] | None
TokenId = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]  # JSON's keys are texts
Bias = Annotated[float, Field(ge=-100, le=100)]
OnlyTokenIds = Field(json_schema_extra={"additionalProperties": False})
LogitBias = Annotated[dict[TokenId, Bias], OnlyTokenIds] | None

EMPTY: tuple[Any, ...] = (None, [], {}, "auto")  # change nothing in any field
# Field -> the values with which it changes nothing, by the documentation of OpenAI and vLLM.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logprobs": (False,),
    "modalities": (["text"],),
    "priority": (0,),
    "return_token_ids": (False,),
    "service_tier": ("default",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}


def _allow_neutral(schema: dict[str, Any], model: type[Any]) -> None:
    """Write into a JSON schema that neutral values of all other fields are accepted."""
    schema["additionalProperties"] = {"enum": [*EMPTY]}
    for name, values in model.neutral.items():
        schema["properties"].setdefault(name, {"enum": [*EMPTY, *values]})


class Strict(BaseModel):
    """A model that converts no types, except 2.0 to the integer 2, and has the rule of this file.

    Attributes:
        neutral: field -> values that change nothing, for fields that the model does not have.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_allow_neutral
    )
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def leave_out_neutral(cls, body: Any) -> Any:
        """Return an object without the fields that change nothing.

        Args:
            body: the JSON value.

        Returns:
            The value; other fields that the model does not have stay, and are refused.
        """
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name in cls.model_fields or not cls._changes_nothing(name, value):
                kept[name] = value
        return kept

    @classmethod
    def _changes_nothing(cls, name: str, value: Any) -> bool:
        """Return True if a field that the model does not have changes nothing with this value."""
        neutral = (*EMPTY, *cls.neutral.get(name, ()))
        for other in neutral:
            if _is_same(value, other):
                return True
        return False

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


def _is_same(value: Any, other: Any) -> bool:
    """Return True for equal JSON values; for Python, but not for JSON, 1 equals true."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _convert_integers(value: Any) -> Any:
    """Return integral floats as integers, in nested lists too."""
    if isinstance(value, list):
        return [_convert_integers(element) for element in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


class Sampling(Strict):
    """The options for the choice of tokens and the end of an answer."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, description="-1 and 0: all tokens")] | None = None
    seed: Annotated[int, Field(ge=-(2**53), le=2**53)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logit_bias: LogitBias = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: Annotated[bool, Field(description="end tokens do not end an answer")] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=16)] | None = None
    stream: bool | None = None

    def rules(self) -> dict[str, Any]:
        """Return the fields that the client has given, by their names in the engine's request."""
        names = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        given: dict[str, Any] = {}
        for name in (*names, "min_tokens", "ignore_eos", "seed"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        given["top_k"] = max(0, self.top_k or 0)  # -1, all tokens in vLLM, is 0 in the engine
        biases = self.logit_bias or {}
        given["logit_bias"] = {int(token): bias for token, bias in biases.items()}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        given["stop"] = tuple(stop or ())
        given["stop_ids"] = frozenset(self.stop_token_ids or ())
        return given


class StreamOptions(Strict):
    """The additional contents of a stream."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: (
        Annotated[bool, Field(description="with include_usage: in every event, as vLLM")] | None
    ) = None


class JSONSchema(Strict):
    """The JSON schema of an answer."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}  # any JSON value
    strict: Annotated[bool, Field(description="no effect: answers always obey")] | None = None


class AnswerFormat(Strict):
    """The format of an answer: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class OpenAI(Sampling):
    """The fields that OpenAI's two endpoints share."""

    model: str
    max_tokens: PositiveInt = None
    temperature: (
        Annotated[float, Field(ge=0, le=2, description="default 1, as OpenAI's; 0 is greedy")]
        | None
    ) = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=64, description="answers to each prompt")] | None = None
    response_format: AnswerFormat | None = None
    # about the client, not the answer
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    request_id: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


class Part(Strict):
    """A part of a message: only text is supported."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """The function of a tool call, with its arguments as JSON text."""

    name: Text
    arguments: str


class ToolCall(Strict):
    """A tool call in an earlier turn of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, Field(ge=0, description="from a stream; no effect")] | None = None


class Message(Strict):
    """One turn of a conversation. Only the content of an assistant may be null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(min_length=1)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return the message in the form of chat templates, with its parts joined.

        `developer` is OpenAI's newer name of the role `system`.

        Raises:
            ValueError: the content is missing.
        """
        content = self.content
        if content is None and self.role != "assistant":
            raise ValueError("content: expected text or a list of parts, got null.")
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content or ""}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        for field in ("name", "reasoning_content", "tool_call_id"):
            value = getattr(self, field)
            if value is not None:
                message[field] = value
        return message


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool of the client."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: Text


class NamedTool(Strict):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class Chat(OpenAI):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: PositiveInt = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class Completion(OpenAI):
    """The body of POST /v1/completions: texts to continue, or their token ids."""

    prompt: Text | TokenIds | Texts | TokenIdLists
    max_tokens: Annotated[int, Field(ge=0, description="0 only reads the prompt")] | None = None
    echo: Annotated[bool, Field(description="the prompt is a part of the answer")] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, description="only the value of n")] | None = None


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
