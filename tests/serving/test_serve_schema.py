"""Proves that the server and its /openapi.json agree on every request of schemathesis.

A request that the schema allows is answered. A request that it forbids is refused with a documented
status and body. No request causes an error 500.

A schema cannot express how many tokens a text has, or which two fields exclude each other. Such
refusals are recognised by their messages.
"""

import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.openapi.checks import RejectedPositiveData

from helpers.served import build, serving

LIMITS = {"max_tokens": 2, "max_length": 64, "waiting": 500, "batch_size": 16}
QUICK = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
)
BEYOND = re.compile(
    "exceed the 64|gives at most 2|differ: give one|only with stream|each from 0 to|chat template"
    "|expected text or a list of parts, got null|best_of: expected the value of n"
    "|is a text, and it is not JSON|response_format|tool_choice: |tools: "
    "|n: expected at most|top_logprobs: allowed only|logit_bias: expected token ids from"
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_server_obeys_its_schema(mode):
    answers = []
    with serving(build(adapters=2), **LIMITS) as server:
        for found in schemathesis.openapi.from_url(
            f"{server.url}/openapi.json"
        ).get_all_operations():
            operation = found.ok()
            if mode == GenerationMode.NEGATIVE and operation.method == "get":
                continue  # no input that could be wrong

            @QUICK
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case):
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "base"
                answer = case.call()
                answers.append(answer)
                try:
                    case.validate_response(answer)
                except FailureGroup as group:
                    wrong = [
                        one for one in group.exceptions if not isinstance(one, RejectedPositiveData)
                    ]
                    if wrong or not BEYOND.search(answer.text):
                        raise

            ask()
    assert not any(answer.status_code >= 500 for answer in answers)
    assert (
        sum(
            answer.status_code == (200 if mode == GenerationMode.POSITIVE else 400)
            for answer in answers
        )
        > 10
    )
