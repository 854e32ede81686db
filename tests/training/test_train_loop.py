"""Proves that the flat loop of examples/train_loop.py trains as `ml.train` does.

Both use the same batches in fp32.
"""

import importlib.util

import pytest
import torch

from helpers.chats import chat, furnish
from helpers.source import ROOT, lines
from minilora import LoRAConfig, TrainConfig, inject, load_model, load_tokenizer, train
from minilora.training.batch_sampler import BatchPlan

STEPS = 20
BATCH_SIZE = 4
LEARNING_RATE = 1e-2
WORDS = ["ab", "hello world", "a longer answer than the others", "x", "he said as much", "zz top"]


def flat_loop():
    """Import examples/train_loop.py, which is a script in no package."""
    spec = importlib.util.spec_from_file_location("train_loop", ROOT / "examples/train_loop.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_loop_has_the_losses_of_ml_train(tmp_path):
    """Twenty steps from one adapter in 4 bits: losses within 1e-5 of each other, relative.

    Both sum the same fp32 terms in another order. One step differs by a few eps = 1.2e-7; twenty
    steps of AdamW, each bounded by the learning rate, keep the difference below 100 eps.
    """
    folder = furnish(tmp_path)
    tokenizer = load_tokenizer(folder / "model")
    messages = [chat(f"{i}: {word}", word) for i, word in enumerate(WORDS * 3)]
    config = TrainConfig(
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        group_by_length=False,
    )

    def adapted():
        model = load_model(folder / "model", quantize="nf4", dtype="float32", device="cpu")
        inject(model, LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        return model

    rows = [{"messages": row} for row in messages]
    expected = train(adapted(), tokenizer, rows, config).losses

    loop = flat_loop()
    examples = [loop.encode(tokenizer, row) for row in messages]
    plan = BatchPlan([len(ids) for ids, _ in examples], config)
    batches = [[examples[i] for micro in plan[step] for i in micro] for step in range(STEPS)]
    found = loop.train_loop(adapted(), batches, tokenizer.pad_token_id, LEARNING_RATE)

    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < 0.7 * found[0]  # the model learns


def test_train_loop_supervises_the_answer_alone(tmp_path):
    loop = flat_loop()
    tokenizer = load_tokenizer(furnish(tmp_path) / "model")
    ids, labels = loop.encode(tokenizer, chat("a question", "hello"))
    supervised = [label for label in labels if label != loop.IGNORE]
    assert tokenizer.decode(supervised) == "hello<|im_end|>"
    assert ids[-len(supervised) :] == supervised
    padded_ids, padded_labels = loop.collate([(ids, labels), (ids[:3], labels[:3])], pad_id=0)
    assert padded_ids.shape == padded_labels.shape == (2, len(ids))
    assert torch.all(padded_labels[1, 3:] == loop.IGNORE)


def test_train_loop_fits_on_a_page():
    assert lines("examples/train_loop.py") <= 100
