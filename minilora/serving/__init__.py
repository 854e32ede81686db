"""The OpenAI-compatible HTTP server.

serve.py           serve: check the settings, start the server
config.py          ServeConfig
server.py          the process: listen, drain, stop
app.py             the HTTP routes
schema.py          the requests that clients send
errors.py          sentences about invalid fields
responses.py       the responses, whole or as events
structured.py      JSON answers, tools and their calls
logprobs.py        log-probabilities in the form of each endpoint
middleware.py      token, limits, the allowed folder
engine_client.py   connects the HTTP routes to the engine thread
engine_thread.py   runs the engine
metrics.py         counters for Prometheus
page.html          a page to try the server
"""
