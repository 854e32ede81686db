"""LoRA in a custom layer, and in a transformers model.

Run it with `python examples/custom_layer.py`.

Idea: an adapter is added to the Linear, Conv1d and Embedding modules inside a layer, so the layer
itself needs no code for LoRA. `ml.train` needs only two things of a model: `.config` and logits.
With its adapter disabled, the model is unchanged, bit for bit.

Both models start with random weights. First, all parameters are trained on the descriptions of
diseases in ICD-10-CM. Then an adapter is trained on those of injuries and their causes. Whole
three-character categories are held out. The last printed line is one JSON document.
"""

import importlib.util
import json
import math
import os
import time
from collections import Counter
from types import SimpleNamespace

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

import minilora as ml

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # fewer steps and rows, every check
VOCABULARY = 1500  # V
WIDTH = 128  # D
LAYERS = 3


class GatedConvolution(nn.Module):
    """A residual layer over the last three tokens: x + W (conv(norm(x)) ∘ silu(G norm(x)))."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer, (B, T, D)."""
        normed = self.norm(x)  # (B, T, D)
        padded = F.pad(normed.transpose(1, 2), (2, 0))  # (B, D, T + 2), so no token sees the next
        mixed = self.conv(padded).transpose(1, 2)  # (B, T, D)
        gate = F.silu(self.gate(normed))  # (B, T, D)
        return x + self.out(mixed * gate)


class ConvolutionModel(nn.Module):
    """A language model of an embedding, gated convolutions and an output layer."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=512)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.Sequential()
        for _ in range(LAYERS):
            self.layers.append(GatedConvolution())

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """Return the logits. Padding is on the right, so the mask is not needed."""
        hidden = self.layers(self.embed(input_ids))  # (B, T, D)
        return SimpleNamespace(logits=self.head(hidden))  # (B, T, V)


def transformers_model() -> nn.Module:
    """Return a GPT-NeoX model of the same size with random weights; nothing is downloaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
    )
    return AutoModelForCausalLM.from_config(config)


def read_rows() -> dict[str, list[dict[str, str]]]:
    """Return the descriptions as rows of plain text, by split and kind."""
    test_rows = 400
    if SHORT:
        test_rows = 40
    task = ml.samples.icd10(test_rows=test_rows, rows_per_category=10)
    return {
        "train injuries": texts(task.train, injuries=True),
        "train diseases": texts(task.train, injuries=False),
        "injuries": texts(task.test, injuries=True),
        "diseases": texts(task.test, injuries=False),
    }


def texts(rows: list[ml.samples.Row], injuries: bool) -> list[dict[str, str]]:
    """Return the descriptions of injuries and their causes, or those of diseases."""
    selected = []
    for row in rows:
        is_injury = ml.samples.answer_of(row) in ("injury", "external")
        if is_injury == injuries:
            selected.append({"text": ml.samples.question_of(row)})
    return selected


def train_tokenizer(rows: list[dict[str, str]]) -> ml.data.Tokenizer:
    """Return a byte-level BPE tokenizer with 1,500 tokens, trained on the rows."""
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=ByteLevel.alphabet(),
    )
    backend.train_from_iterator([row["text"] for row in rows], trainer)
    return ml.data.Tokenizer(backend, {"eos_token": "<end>"})


def train_and_adapt(
    model: nn.Module,
    targets: list[str] | str,
    tokenizer: ml.data.Tokenizer,
    rows: dict[str, list[dict[str, str]]],
) -> dict[str, float]:
    """Train all parameters on diseases, then an adapter on injuries.

    Args:
        model: A model with random weights.
        targets: Modules that get an adapter.
        tokenizer: The tokenizer of the rows.
        rows: Rows by split and kind, from `read_rows`.

    Returns:
        The perplexities on the held-out rows of both kinds, before and after the adapter.
    """

    def perplexity(kind: str) -> float:
        return ml.evaluate(model, tokenizer, rows[kind]).perplexity

    shared = {"max_steps": 150, "per_device_train_batch_size": 32, "warmup_ratio": 0.1}
    if SHORT:
        shared["max_steps"] = 2
    full = ml.TrainConfig(method="full", learning_rate=3e-3, **shared)
    ml.train(model, tokenizer, rows["train diseases"], full)
    injuries_before = perplexity("injuries")
    diseases_before = perplexity("diseases")

    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules=targets))
    config = ml.TrainConfig(learning_rate=1e-2, **shared)
    ml.train(model, tokenizer, rows["train injuries"], config)
    with ml.disable_adapters(model):
        assert perplexity("injuries") == injuries_before  # the base is unchanged
    return {
        "injuries, before": injuries_before,
        "injuries, after": perplexity("injuries"),
        "diseases, before": diseases_before,
        "diseases, after": perplexity("diseases"),
    }


def unigram_perplexity(train_ids: list[int], test_ids: list[int]) -> float:
    """Return the perplexity of token frequencies, p = (1 + count) / (V + number of tokens)."""
    counts = Counter(train_ids)
    total = VOCABULARY + len(train_ids)
    log_likelihood = 0.0
    for token in test_ids:
        log_likelihood += math.log((1 + counts[token]) / total)
    return math.exp(-log_likelihood / len(test_ids))


def print_table(table: dict[str, dict[str, float]], unigram: float) -> None:
    """Print the perplexities, a line for each model and one for the baseline."""
    header = f"\n{'perplexity':<14}"
    for name in table["own layer"]:
        header += f"{name:>18}"
    print(header)
    for name, perplexities in table.items():
        line = f"{name:<14}"
        for value in perplexities.values():
            line += f"{value:18.1f}"
        print(line)
    print(f"{'token counts':<14}{'':18}{unigram:18.1f}   no model")


def main() -> dict:
    """Run the example and return the printed document; MINILORA_SHORT=1 cuts steps and rows."""
    start_time = time.perf_counter()
    rows = read_rows()
    tokenizer = train_tokenizer(rows["train diseases"] + rows["train injuries"])

    torch.manual_seed(0)
    targets = ["embed", "conv", "gate", "out"]
    table = {"own layer": train_and_adapt(ConvolutionModel(), targets, tokenizer, rows)}
    if importlib.util.find_spec("transformers"):
        model = transformers_model()
        table["transformers"] = train_and_adapt(model, "all-linear", tokenizer, rows)
    else:
        print("left out: the transformers model (pip install transformers)")

    # A baseline without a model: the frequency of each token. A line break stands for the end.
    ids = {}
    for kind in ("train injuries", "injuries"):
        text = "\n".join(row["text"] for row in rows[kind])
        ids[kind] = tokenizer.encode(text)
    unigram = unigram_perplexity(ids["train injuries"], ids["injuries"])

    print_table(table, unigram)
    if not SHORT:
        for perplexities in table.values():
            assert perplexities["injuries, after"] < perplexities["injuries, before"]
            assert perplexities["injuries, after"] < unigram
    document = {"table": table, "unigram": unigram, "seconds": time.perf_counter() - start_time}
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
