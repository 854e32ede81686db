"""Sequence classification: a label for a text, read off the last token.

    logits = W_score h_T              h_T (D,): hidden state of the text's last token, which has seen all the others
    loss   = sum over the rows of  -log softmax(logits)[label]

The head `score`, (labels, D) without bias, is a module beside the decoder's, trained whole: the adapter file is what
PEFT writes for its task SEQ_CLS, and PEFT loads it around transformers' ...ForSequenceClassification.

    objective = ml.Classify(["negative", "positive"])
    objective.add_head(model)
    ml.inject(model, ml.LoRAConfig(target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]))

A row is {"text", "label"} or {"messages", "label"}; messages end with the template's generation prompt. No end token is
added, as in transformers. Reported beside the loss: accuracy.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.common import unknown
from minilora.data import IGNORE, Example, RawText, encode_prompt, read_dataset
from minilora.data.dataset import Encoded
from minilora.data.formats import extra_keys, shape_of
from minilora.data.report import numbers
from minilora.losses.sft import padded
from minilora.models.padded_batch import inference


@dataclass(frozen=True)
class Classify:
    """Learn which of `labels` a text has. ValueError for a label that is none of them, or a model without `score`."""

    better: ClassVar[tuple[str, ...]] = ("accuracy",)

    labels: list[str] = field(metadata={"help": "the classes, with commas between"})

    def __post_init__(self):
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels: expected at least two, all different, got {self.labels}.")

    def add_head(self, model: Any, seed: int = 0) -> None:
        """Give `model` a layer `score`, N(0, 0.02²): before `inject`, which trains it, or `load_adapter`."""
        if hasattr(model, "score"):
            raise ValueError(f"{type(model).__name__} has a layer `score` already: go on with that one.")
        weight = model.get_input_embeddings().weight
        head = nn.Linear(weight.shape[1], len(self.labels), bias=False)
        nn.init.normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        model.score = head.to(weight.device, weight.dtype).requires_grad_(False)

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None) -> Encoded:
        rows = read_dataset(dataset)
        texts = [self._encode(row, tokenizer, max_length, i) for i, row in enumerate(rows)]
        counts = Counter(self.labels[text.label] for text in texts)
        report = f"{len(texts)} rows, {sum(map(len, texts))} tokens, longest {max(map(len, texts))}; "
        report += ", ".join(f"{label} {counts[label]}" for label in self.labels)
        if cut := [text.row for text in texts if text.truncated]:
            report += f"\n  {len(cut)} rows cut at max_length {max_length}: their end is not read ({numbers(cut)})"
        if unused := sorted(set().union(*(extra_keys(row, i) for i, row in enumerate(rows))) - {"label"}):
            report += f"\n  keys not used: {', '.join(unused)}"
        return Encoded(texts, report)

    def collate(self, examples: Sequence["LabelledText"]) -> dict[str, Tensor]:
        return padded(examples) | {"label": torch.tensor([example.label for example in examples])}  # (B,)

    def weight(self, batch: dict[str, Tensor]) -> int:
        return len(batch["label"])  # rows

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.logits(model, batch)  # (B, L)
        label = batch["label"].to(logits.device)  # (B,)
        return F.cross_entropy(logits, label, reduction="sum"), {"accuracy": (logits.argmax(-1) == label).float().sum()}

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The score of every label, (B, L) in fp32, of `input_ids` and `attention_mask`, both (B, T)."""
        if not hasattr(model, "score"):
            raise ValueError(
                f"{type(model).__name__} has no layer `score`: objective.add_head(model) before ml.inject."
            )
        device = next(model.parameters()).device
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)  # (B, T)
        if hasattr(model, "hidden"):
            hidden = model.hidden(ids)  # (B, T, D)
        else:  # of transformers: what stands below its own score
            hidden = getattr(model, model.base_model_prefix)(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = model.score(hidden[torch.arange(len(ids), device=device), mask.sum(1) - 1]).float()  # (B, L)
        if logits.shape[1] != len(self.labels):
            raise ValueError(
                f"labels: the model's `score` has {logits.shape[1]} outputs, and there are {len(self.labels)}."
            )
        return logits

    def predict(self, model: Any, tokenizer: Any, texts: Sequence[Any], batch_size: int = 16) -> list[str]:
        """The likeliest label of each text, a str or messages; `batch_size` changes no result."""
        examples = [_example(text, tokenizer, None, i) for i, text in enumerate(texts)]
        found = [0] * len(examples)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]), reverse=True)  # little padding
        with inference(model):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                best = self.logits(model, padded([examples[i] for i in batch])).argmax(-1)
                for i, label in zip(batch, best.tolist(), strict=True):
                    found[i] = label
        return [self.labels[label] for label in found]

    def _encode(self, row: Mapping[str, Any], tokenizer: Any, max_length: int | None, index: int) -> "LabelledText":
        if (shape := shape_of(row, index)) not in ("text", "messages"):
            raise ValueError(f"row {index}: expected text and label, or messages and label, got the shape {shape}.")
        if row.get("label") not in self.labels:
            raise unknown(f"row {index}: label", str(row.get("label")), self.labels)
        return replace(_example(row[shape], tokenizer, max_length, index), label=self.labels.index(row["label"]))


@dataclass(frozen=True)
class LabelledText(Example):
    """A text as token ids, none of them trained, and the number of its label."""

    label: int = 0


def _example(text: Any, tokenizer: Any, max_length: int | None, index: int) -> LabelledText:
    ids = encode_prompt(RawText(text) if isinstance(text, str) else text, tokenizer)
    kept = ids[:max_length]
    return LabelledText(kept, [IGNORE] * len(kept), row=index, truncated=len(kept) < len(ids))
