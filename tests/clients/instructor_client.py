"""instructor: a nested pydantic class, by tools and by JSON schema."""

import sys

import instructor
import openai
import pydantic


class Owner(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=5)


class Pet(pydantic.BaseModel):
    owner: Owner
    legs: int = pydantic.Field(ge=0, le=8)


base = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(base, mode=mode)
    pet = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hello"}],
        response_model=Pet,
        max_retries=0,
    )
    assert isinstance(pet, Pet), mode
