"""langchain-openai: a whole answer, a stream, a conversation, log-probabilities."""

import asyncio
import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

options = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none", "model": "base", "max_retries": 0}
chat = ChatOpenAI(**options, max_tokens=6, temperature=0)

question = [SystemMessage("be brief"), HumanMessage("hello")]
answer = chat.invoke(question)
assert isinstance(answer, AIMessage) and answer.usage_metadata["output_tokens"] == 6
streamed = "".join(chunk.content for chunk in chat.stream(question))
assert streamed == answer.content
again = asyncio.run(chat.ainvoke([*question, answer, HumanMessage("and then?")]))
assert again.content

scored = chat.bind(logprobs=True, top_logprobs=2).invoke(question)
assert len(scored.response_metadata["logprobs"]["content"]) == 6

complete = OpenAI(**options, max_tokens=4, temperature=0)
assert complete.invoke("hello")
