"""pydantic-ai: an output type by tools and by JSON schema."""

import sys

import pydantic
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Pet(pydantic.BaseModel):
    kind: str = pydantic.Field(max_length=5)
    legs: int = pydantic.Field(ge=0, le=8)


provider = OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="none")
model = OpenAIChatModel("base", provider=provider)
for output in (Pet, NativeOutput(Pet)):
    answer = Agent(model, output_type=output).run_sync("hello").output
    assert isinstance(answer, Pet), output
