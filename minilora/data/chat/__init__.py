"""Conversations: from the forms in which datasets and clients store them to checked text.

values.py       nested values: absent ones, and JSON stored as text
messages.py     messages and tools of any known form → OpenAI's form
rendering.py    messages → text of the chat template, which must show all of them
tool_calls.py   the text of an answer → its tool calls
marks.py        marks in messages, by which the text of each of them is found
"""
