"""LoRA in a layer of one's own, and in a model of transformers. python examples/custom_layer.py

One idea: an adapter goes onto the Linear, Conv1d and Embedding inside a layer, so the layer need
not know of LoRA, and `ml.train` asks a model only for `.config` and for logits. With the adapter
off the model is what it was, bit for bit.

Both are made from nothing: every parameter trained on ICD-10-CM's descriptions of diseases, then an
adapter on those of injuries and their causes, held out by three-character category. The last line
printed is one JSON document.
"""

import importlib.util
import json
import math
import os
import time
from collections import Counter
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

import minilora as ml
from minilora.data.tokenizer import Tokenizer as Words
from minilora.evaluation.samples.task import answer_of, question_of

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # fewer steps and rows, every check
VOCABULARY, WIDTH, LAYERS = 1500, 128, 3


class GatedConvolution(nn.Module):
    """x + W (conv(x) ∘ silu(G x)): the last three tokens, gated by the present one."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.conv, self.gate, self.out = (
            nn.Conv1d(WIDTH, WIDTH, 3),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        normed = self.norm(x)
        past = F.pad(normed.transpose(1, 2), (2, 0))  # (B, D, T + 2): no token sees the next one
        return x + self.out(self.conv(past).transpose(1, 2) * F.silu(self.gate(normed)))


class Own(nn.Module):
    """Embedding, three layers as above, output layer."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=512)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.Sequential(*(GatedConvolution() for _ in range(LAYERS)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(
            logits=self.head(self.layers(self.embed(input_ids)))
        )  # (B, T, V); reads left to right


def of_transformers() -> nn.Module:
    """A GPT-NeoX of the same size with random weights; nothing is downloaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_neox", intermediate_size=2 * WIDTH, **size)
    )


def adapt(
    model: nn.Module, targets: list[str] | str, tokenizer: Words, rows: dict[str, list]
) -> dict[str, float]:
    """Train all of it on diseases, then an adapter on injuries; perplexities of both, of held-out categories."""

    def measure(name: str) -> float:
        return ml.evaluate(model, tokenizer, rows[name], batch_size=32).perplexity

    steps = {
        "max_steps": 2 if SHORT else 150,
        "per_device_train_batch_size": 32,
        "warmup_ratio": 0.1,
    }
    ml.train(
        model,
        tokenizer,
        rows["train diseases"],
        ml.TrainConfig(method="full", learning_rate=3e-3, **steps),
    )
    found = {f"{name}, before": measure(name) for name in ("injuries", "diseases")}
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules=targets))
    ml.train(model, tokenizer, rows["train injuries"], ml.TrainConfig(learning_rate=1e-2, **steps))
    with ml.disable_adapters(model):
        assert measure("injuries") == found["injuries, before"]  # the base is what it was
    found |= {f"{name}, after": measure(name) for name in ("injuries", "diseases")}
    return {
        name: found[name] for name in sorted(found, reverse=True)
    }  # injuries first, and before before after


def main() -> dict:
    """Run the example; returns the document it prints. MINILORA_SHORT=1 cuts steps and rows."""
    started, task = (
        time.perf_counter(),
        ml.samples.icd10(test_rows=40 if SHORT else 400, rows_per_category=10),
    )
    rows: dict[str, list[dict[str, str]]] = {}
    for part, found in (("train ", task.train), ("", task.test)):
        for row in found:
            kind = "injuries" if answer_of(row) in ("injury", "external") else "diseases"
            rows.setdefault(part + kind, []).append({"text": question_of(row)})

    # A tokenizer of one's own: 1,500 pieces that are common in what is trained on.
    pieces, letters = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.pre_tokenizer, alphabet = letters, letters.alphabet()
    learn = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet
    )
    pieces.train_from_iterator(
        [row["text"] for row in rows["train diseases"] + rows["train injuries"]], learn
    )
    tokenizer = Words(pieces, {"eos_token": "<end>"})

    torch.manual_seed(0)
    table = {"own layer": adapt(Own(), ["embed", "conv", "gate", "out"], tokenizer, rows)}
    if importlib.util.find_spec("transformers"):
        table["transformers"] = adapt(of_transformers(), "all-linear", tokenizer, rows)
    else:
        print("left out: a model of transformers (pip install transformers)")

    # What needs no model: how common each token is, p = (1 + count) / (V + all); a line break
    # stands for the end.
    seen, asked = (
        tokenizer.encode("\n".join(row["text"] for row in rows[k]))
        for k in ("train injuries", "injuries")
    )
    counts, total = Counter(seen), VOCABULARY + len(seen)
    unigram = math.exp(-sum(math.log((1 + counts[token]) / total) for token in asked) / len(asked))
    print(f"\n{'perplexity':<14}" + "".join(f"{name:>18}" for name in table["own layer"]))
    for name, found in table.items():
        print(f"{name:<14}" + "".join(f"{value:18.1f}" for value in found.values()))
    print(f"{'token counts':<14}{'':18}{unigram:18.1f}   no model")
    assert SHORT or all(
        t["injuries, after"] < min(unigram, t["injuries, before"]) for t in table.values()
    )
    print(
        json.dumps(
            document := {
                "table": table,
                "unigram": unigram,
                "seconds": time.perf_counter() - started,
            }
        )
    )
    return document


if __name__ == "__main__":
    main()
