"""Small tokenizers with four chat templates, for the tests of minilora.data. No download.

The tokenizers are byte-level BPE: 256 bytes, a few merges and the special tokens of each family.
The templates are short, but each has the difficulty of its family. ChatML has a newline after its
end token. Llama-3 writes a BOS, which the tokenizer would add a second time, and trims contents.
Mistral has no generation prompt and a strict order of roles. Qwen3 rewrites earlier turns.
"""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from helpers.tiny import save
from minilora.data import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}{{ ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
QWEN3 = """\
{%- if tools %}{{ '<|im_start|>system\\n' + (tools | map('tojson') | join('\\n')) + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set thought = message.reasoning_content or '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.question and (loop.last or thought) %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# family -> template, special tokens, EOS, BOS, True if the tokenizer itself adds BOS
FAMILIES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>", None, False),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "<|begin_of_text|>",
        True,
    ),
    "mistral": (MISTRAL, ["<s>", "</s>"], "</s>", "<s>", True),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>", None, False),
}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "qwen3": "<|im_end|>"}
MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "w"),
    ("Ġ", "hello"),
    ("Ċ", "Ċ"),
    ("a", "s"),
]


LLAMA3_WORDS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def backend(special: list[str], bos: str | None = None):
    """Return a `tokenizers.Tokenizer` of bytes, MERGES and the tokens `special`.

    If `bos` is given, the tokenizer adds it to the front of every text. Words are split as in
    GPT-2. Llama-3 groups newlines, so the tokenizer for its template does too.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i for i, token in enumerate([*alphabet, *(left + right for left, right in MERGES)])
    }
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if "<|eot_id|>" in special:
        words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    if bos is not None:
        made.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, made.token_to_id(bos))]
        )
    return made


@cache
def ours(family: str) -> Tokenizer:
    """Return the family's tokenizer as a minilora Tokenizer."""
    template, special, eos, bos, adds_bos = FAMILIES[family]
    names = {"eos_token": eos, "bos_token": bos, "pad_token": special[-1]}
    return Tokenizer(backend(special, bos if adds_bos else None), names, template)


@cache
def theirs(family: str):
    """Return the same tokenizer as a transformers tokenizer."""
    from transformers import PreTrainedTokenizerFast

    template, special, eos, bos, adds_bos = FAMILIES[family]
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend(special, bos if adds_bos else None),
        eos_token=eos,
        bos_token=bos,
        pad_token=special[-1],
    )
    made.chat_template = template
    return made


def real_template(name: str) -> str:
    """Return a published chat template, of the copies that TRL ships: "qwen3", "llama3_1", …"""
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


def real(name: str, family: str = "chatml") -> Tokenizer:
    """Return the family's tokenizer with a published chat template."""
    tokenizer = ours(family)
    return Tokenizer(tokenizer.backend, tokenizer.special_tokens, real_template(name))


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages of user and assistant in turn, after an optional system message."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return [{"role": "system", "content": system}, *turns] if system else turns


def furnish(folder: Path, **datasets: list[dict]) -> Path:
    """Write a small model and its tokenizer to folder/model, and each dataset to NAME.jsonl."""
    chat = ours("chatml")
    torch.manual_seed(0)
    save(folder / "model", vocab_size=len(chat), tie_word_embeddings=True)
    chat.save_pretrained(folder / "model")
    for name, rows in datasets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
