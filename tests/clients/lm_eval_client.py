"""lm-eval: log-likelihoods of local-completions equal those of its hf model of the same folder."""

import sys

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, folder = sys.argv[1:]
PAIRS = [("hello", " world"), ("the answer is", " b"), ("a b", " c d e"), ("a hello wo", "rld")]
TOLERANCE = 1e-4  # nats, of a continuation; both compute in fp32


def requests(kind, pairs):
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=number)
        for number, pair in enumerate(pairs)
    ]


served = LocalCompletionsAPI(
    base_url=f"{url}/v1/completions",
    model="base",
    tokenizer=folder,
    tokenizer_backend="huggingface",
    batch_size=2,
    max_length=256,
)
local = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=2, max_length=256)
found = served.loglikelihood(requests("loglikelihood", PAIRS))
expected = local.loglikelihood(requests("loglikelihood", PAIRS))
for (log_p, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
    assert abs(log_p - wanted) < TOLERANCE, (found, expected)
    assert greedy == wanted_greedy, (found, expected)
assert len({log_p for log_p, _ in found}) == len(PAIRS)

rolling = [("hello world, a b c",)]
(total,) = served.loglikelihood_rolling(requests("loglikelihood_rolling", rolling))
(wanted,) = local.loglikelihood_rolling(requests("loglikelihood_rolling", rolling))
assert abs(total - wanted) < TOLERANCE, (total, wanted)

until = [("hello", {"until": ["\n"], "max_gen_toks": 5})]
assert isinstance(served.generate_until(requests("generate_until", until))[0], str)
