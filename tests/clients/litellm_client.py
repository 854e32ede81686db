"""litellm: a whole answer, a stream, a completion and the error of a wrong model."""

import sys

import litellm

options = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none", "max_retries": 0}
messages = [{"role": "user", "content": "hello"}]
given = options | {"model": "openai/base", "messages": messages, "max_tokens": 6, "temperature": 0}

answer = litellm.completion(**given)
assert answer.usage.completion_tokens == 6
text = ""
for chunk in litellm.completion(**given, stream=True):
    text += chunk.choices[0].delta.content or ""
assert text == answer.choices[0].message.content

messages.append(answer.choices[0].message.model_dump())
messages.append({"role": "user", "content": "and then?"})
assert litellm.completion(**given).choices[0].message.content

completion = litellm.text_completion(
    **options, model="text-completion-openai/base", prompt="hello", max_tokens=4, logprobs=1
)
assert completion.choices[0].text is not None

try:
    litellm.completion(**(given | {"model": "openai/nobody"}))
except litellm.NotFoundError as error:
    assert "Expected one of base" in str(error)
else:
    raise AssertionError("a wrong model has an answer")
