"""openai: a pydantic class, and a tool whose call is streamed and answered."""

import json
import sys

import openai
import pydantic


class Pet(pydantic.BaseModel):
    kind: str = pydantic.Field(max_length=5)
    legs: int = pydantic.Field(ge=0, le=8)


client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": "hello"}]
parsed = client.chat.completions.parse(model="base", messages=messages, response_format=Pet)
assert isinstance(parsed.choices[0].message.parsed, Pet)

tool = openai.pydantic_function_tool(Pet)
with client.chat.completions.stream(
    model="base", messages=messages, tools=[tool], tool_choice="required"
) as stream:
    events = [event.type for event in stream]
    final = stream.get_final_completion().choices[0]
assert "tool_calls.function.arguments.delta" in events and final.finish_reason == "tool_calls"
(call,) = final.message.tool_calls
assert isinstance(call.function.parsed_arguments, Pet)

messages.append(json.loads(final.message.model_dump_json(exclude={"parsed"})))
for entry in messages[-1]["tool_calls"]:
    entry["function"].pop("parsed_arguments", None)
messages.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
assert client.chat.completions.create(
    model="base", messages=messages, tools=[tool], max_tokens=4
).choices
