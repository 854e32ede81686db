"""OpenAI's client: a conversation, a stream, completions with log-probabilities."""

import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)

messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"}]
for _ in range(2):
    answer = client.chat.completions.create(model="base", messages=messages, max_tokens=4)
    messages.append(answer.choices[0].message)  # OpenAI's documented idiom
    messages.append({"role": "user", "content": "and then?"})

given = {"model": "base", "messages": messages, "max_tokens": 8, "temperature": 0}
whole = client.chat.completions.create(**given, logprobs=True, top_logprobs=2).choices[0]
text = ""
for chunk in client.chat.completions.create(**given, stream=True):
    text += chunk.choices[0].delta.content or ""
assert text == whole.message.content
assert len(whole.logprobs.content) == 8

completion = client.completions.create(
    model="base", prompt="hello world", max_tokens=0, echo=True, logprobs=1
)
assert completion.choices[0].text == "hello world"
assert sum(completion.choices[0].logprobs.token_logprobs[1:]) < 0
assert [model.id for model in client.models.list()] == ["base", "adapter0"]
