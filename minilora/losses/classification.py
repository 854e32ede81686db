"""Sequence classification: a label for a text, read from the hidden state of its last token.

    logits = W_score · h_T       h_T (D,): hidden state of the last token, which attends to all
    loss   = Σ over rows of −log softmax(logits)[label]

The head `score` (labels, D), without bias, is a module of the model and is trained in full. The
adapter file is the one that PEFT writes for its task SEQ_CLS. PEFT loads it around transformers'
...ForSequenceClassification. The metadata of the file keeps the names of the labels in the order of
the outputs: with other names, or in another order, the classifier is refused.

    objective = ml.Classify(["negative", "positive"])
    objective.add_head(model)
    config = ml.LoRAConfig(
        target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    ml.inject(model, config)

A row is {"text", "label"} or {"messages", "label"}; messages end with the generation prompt of the
template. No end token is added, as in transformers. The accuracy is reported next to the loss.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.common import order_by_length, unknown_name, unwrap_model
from minilora.data import IGNORE, Chat, Example, RawText, as_messages, encode_prompt, read_dataset
from minilora.data.chat_template import with_template_kwargs
from minilora.data.dataset import Encoded
from minilora.data.formats import extra_keys, shape_of
from minilora.data.report import numbers
from minilora.lora.files.label_names import labels_of
from minilora.losses.sft import padded, run_hidden
from minilora.models.padded_batch import inference


@dataclass(frozen=True)
class Classify:
    """Train a model to name the label of a text.

    Attributes:
        labels: The classes, at least two. Their order is the order of the head's outputs.

    Raises:
        ValueError: If there are fewer than two different labels.
    """

    better: ClassVar[tuple[str, ...]] = ("accuracy",)

    labels: list[str] = field(metadata={"help": "the classes, separated by commas"})

    def __post_init__(self):
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels: expected at least two, all different, got {self.labels}.")

    def add_head(self, model: Any, seed: int = 0) -> None:
        """Add a head `score`, drawn from N(0, 0.02²), to a model.

        Call it before `inject`, which makes the head trainable, or before `load_adapter`.

        Args:
            model: A model without a head `score`.
            seed: Seed of the head's weights.

        Raises:
            ValueError: If the model has a layer `score` already.
        """
        add_score_head(model, len(self.labels), seed)
        model = unwrap_model(model)
        model.label_names = list(self.labels)

    def encode(self, dataset: Any, tokenizer: Any, max_length: int | None) -> Encoded:
        """Encode labelled texts.

        Args:
            dataset: Rows with text and label, or messages and label; or a path.
            tokenizer: The model's tokenizer.
            max_length: Largest number of tokens of a text; longer ones are cut. None for no limit.

        Returns:
            A `LabelledText` for each row, with a report.

        Raises:
            ValueError: If a row has another shape or an unknown label.
        """
        names = _class_names(dataset)
        rows = read_dataset(dataset)
        texts = []
        unused: set[str] = set()
        for index, row in enumerate(rows):
            texts.append(self._encode_row(row, names, tokenizer, max_length, index))
            unused |= extra_keys(row, index)
        unused.discard("label")
        return Encoded(texts, self._report(texts, unused, max_length))

    def _report(self, texts: list["LabelledText"], unused: set[str], max_length: int | None) -> str:
        """Describe encoded texts: their number, labels, cut rows and unused keys."""
        counts = Counter(self.labels[text.label] for text in texts)
        lengths = [len(text) for text in texts]
        labels = ", ".join(f"{label} {counts[label]}" for label in self.labels)
        lines = [f"{len(texts)} rows, {sum(lengths)} tokens, longest {max(lengths)}; {labels}"]
        cut = [text.row for text in texts if text.truncated]
        if cut:
            lines.append(
                f"  {len(cut)} rows cut at max_length {max_length}: their end is not read "
                f"({numbers(cut)})"
            )
        if unused:
            lines.append(f"  keys not used: {', '.join(sorted(unused))}")
        return "\n".join(lines)

    def collate(self, examples: Sequence["LabelledText"]) -> dict[str, Tensor]:
        """Return the batch of some texts, on the CPU.

        Args:
            examples: B examples of `encode`.

        Returns:
            The tensors of `padded`, (B, T) each, and `label` (B,).
        """
        labels = torch.tensor([example.label for example in examples])  # (B,)
        return padded(examples) | {"label": labels}

    def weight(self, batch: dict[str, Tensor]) -> int:
        """Return the number of rows in a batch.

        Args:
            batch: A batch of `collate`.
        """
        return len(batch["label"])

    def loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of the labels, summed over the rows of a batch.

        Args:
            model: A model with a head `score`.
            batch: A batch of `collate`.

        Returns:
            The sum, an fp32 scalar, and the number of correct labels ("accuracy").
        """
        logits = self.logits(model, batch)  # (B, L)
        label = batch["label"].to(logits.device)  # (B,)
        correct = (logits.argmax(-1) == label).float().sum()
        return F.cross_entropy(logits, label, reduction="sum"), {"accuracy": correct}

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the score of every label.

        Args:
            model: A minilora or transformers model with a head `score`.
            batch: `input_ids` and `attention_mask`, both (B, T).

        Returns:
            Logits (B, L) in fp32.

        Raises:
            ValueError: If the model has no head, or one with another number of outputs.
        """
        logits = last_token_scores(model, batch)  # (B, L)
        if logits.shape[1] != len(self.labels):
            raise ValueError(
                f"labels: the model's `score` has {logits.shape[1]} outputs, and there are "
                f"{len(self.labels)} labels."
            )
        return logits

    def predict(
        self, model: Any, tokenizer: Any, texts: Sequence[Any], batch_size: int = 16
    ) -> list[str]:
        """Return the most likely label of each text.

        Args:
            model: A model with a head `score`.
            tokenizer: The model's tokenizer.
            texts: Strings or lists of messages.
            batch_size: Texts in one forward pass; changes no result.

        Returns:
            One label for each text.

        Raises:
            ValueError: If the model's classifier was trained with other labels, or in another order.
        """
        self.check_names(model)
        examples = [_example(text, tokenizer, None, index) for index, text in enumerate(texts)]
        # Longest first: texts of similar length share a batch, which saves padding.
        order = order_by_length(examples)
        predicted = [0] * len(examples)
        with inference(model):
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                batch = padded([examples[index] for index in indices])
                best = self.logits(model, batch).argmax(-1).tolist()
                for index, label in zip(indices, best, strict=True):
                    predicted[index] = label
        return [self.labels[label] for label in predicted]

    def _encode_row(
        self,
        row: Mapping[str, Any],
        names: Sequence[str],
        tokenizer: Any,
        max_length: int | None,
        index: int,
    ) -> "LabelledText":
        """Return one row as token ids and the number of its label."""
        shape = shape_of(row, index)
        if shape not in ("text", "messages"):
            raise ValueError(
                f"row {index}: expected text and label, or messages and label, got the shape "
                f"{shape}."
            )
        label = self._number(row.get("label"), names, index)
        sample = as_messages(row, index)
        text = sample.messages if isinstance(sample, Chat) else sample.completion
        kwargs = row.get("chat_template_kwargs")
        reader = with_template_kwargs(tokenizer, kwargs, f"row {index}: ")
        example = _example(text, reader, max_length, index)
        return replace(example, label=label)

    def _number(self, label: Any, names: Sequence[str], index: int) -> int:
        """Return the number of a row's label; `names` are those of a ClassLabel column."""
        is_number = isinstance(label, int) and not isinstance(label, bool)
        if is_number and 0 <= label < len(names):
            label = names[label]
        if label in self.labels:
            return self.labels.index(label)
        as_text = [str(known) for known in self.labels]
        if str(label) in as_text:  # a CSV or JSON file has 1 where the label is "1", or "1" for 1
            return as_text.index(str(label))
        if is_number:
            raise ValueError(
                f"row {index}: label {label} is a number, and the labels are {self.labels}. Write "
                "the name into each row, as with row | {'label': names[row['label']]}; the column "
                "of a `datasets` set has them as dataset.features['label'].names."
            )
        raise unknown_name(f"row {index}: label", str(label), as_text)

    def check_names(self, model: Any) -> None:
        """Refuse a model whose head was trained with other label names, or another order of them.

        A model that does not know its names is accepted.

        Args:
            model: A model with a head `score`.

        Raises:
            ValueError: If the names differ, or their order.
        """
        model = unwrap_model(model)
        names = labels_of(model) or _names_in_config(model, self.labels)
        if names is not None and list(map(str, names)) != list(map(str, self.labels)):
            raise ValueError(
                f"labels: the model's classifier was trained with {names}, in this order, and the "
                f"objective has {self.labels}: an output would get the name of another class. Use "
                f"minilora.Classify({names})."
            )


def add_score_head(model: Any, outputs: int, seed: int = 0) -> None:
    """Add a head `score` without bias, drawn from N(0, 0.02²), to a model.

    Args:
        model: A model without a head `score`.
        outputs: Number of outputs.
        seed: Seed of the head's weights.

    Raises:
        ValueError: If the model has a layer `score` already.
    """
    model = unwrap_model(model)
    if hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} has a layer `score` already: continue with that layer."
        )
    weight = model.get_input_embeddings().weight  # (V, D)
    head = nn.Linear(weight.shape[1], outputs, bias=False)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    model.score = head.to(weight.device, weight.dtype).requires_grad_(False)


def last_token_scores(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the outputs of the head `score` at the last token of each row.

    Args:
        model: A minilora or transformers model with a head `score`.
        batch: `input_ids` and `attention_mask`, both (B, T).

    Returns:
        fp32 (B, outputs).

    Raises:
        ValueError: If the model has no head.
    """
    wrapped = model
    model = unwrap_model(model)
    if not hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} has no layer `score`: call objective.add_head(model) "
            "before ml.inject."
        )
    device = next(model.parameters()).device
    ids = batch["input_ids"].to(device)  # (B, T)
    mask = batch["attention_mask"].to(device)  # (B, T)
    if hasattr(model, "hidden"):
        hidden = run_hidden(wrapped, ids)  # (B, T, D)
    else:  # a transformers model: its part below `score`
        decoder = getattr(model, model.base_model_prefix)
        hidden = decoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, D)
    rows = torch.arange(len(ids), device=device)  # (B,)
    last = hidden[rows, mask.sum(1) - 1]  # (B, D)
    return model.score(last).float()  # (B, outputs)


@dataclass(frozen=True)
class LabelledText(Example):
    """A text as token ids, without supervised tokens, and the number of its label.

    Attributes:
        label: Index into `Classify.labels`.
    """

    label: int = 0


def _class_names(dataset: Any) -> Sequence[str]:
    """Return the names of the numbers in the label column of a `datasets` set, if it has them."""
    features = getattr(dataset, "features", None) or {}
    return getattr(features.get("label"), "names", None) or ()


def _names_in_config(model: Any, labels: Sequence[Any]) -> list[str] | None:
    """Return the names in a transformers config if they are these labels, in any order."""
    id2label = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(id2label[number]) for number in sorted(id2label)]
    return names if sorted(names) == sorted(map(str, labels)) else None


def _example(text: Any, tokenizer: Any, max_length: int | None, index: int) -> LabelledText:
    """Return a text or conversation as token ids, cut at max_length."""
    prompt = RawText(text) if isinstance(text, str) else text
    ids = encode_prompt(prompt, tokenizer, place=f"row {index}")
    cut = ids[:max_length]
    labels = [IGNORE] * len(cut)
    return LabelledText(cut, labels, row=index, truncated=len(cut) < len(ids))
