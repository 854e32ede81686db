"""Proves that training with minilora equals training with PEFT and transformers.

From the same model, adapter file and batches both have the same losses for 20 steps and the same
adapter at the end.

The oracle uses only their code: PeftModel from the files, transformers' own labels and loss
(divided by `num_items_in_batch` under accumulation), torch's AdamW, transformers' scheduler.
"""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny import oracle, save, twin
from helpers.toy import Letters, rows
from minilora import samples
from minilora.data import collate, encode_dataset, load_tokenizer
from minilora.lora.config import LoRAConfig
from minilora.lora.files.save_load import adapter_state_dict, save_adapter
from minilora.lora.inject import inject
from minilora.lora.layer import LoRALayer
from minilora.models.loader import load_model
from minilora.models.save import save_model
from minilora.training.batch_sampler import BatchPlan
from minilora.training.config import TrainConfig
from minilora.training.loop import train

STEPS = 20
CONFIG = TrainConfig(
    max_steps=STEPS,
    learning_rate=5e-3,
    warmup_steps=3,
    lr_scheduler_type="cosine",
    weight_decay=0.05,
    per_device_train_batch_size=3,
    gradient_accumulation_steps=2,
)


def train_theirs(model: Any, examples, config: TrainConfig) -> list[float]:
    from transformers import get_scheduler

    plan = BatchPlan([len(e.input_ids) for e in examples], config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.warmup_steps, config.max_steps
    )
    model.train()
    losses = []
    for step in range(config.max_steps):
        batches = [collate([examples[i] for i in micro], pad_id=0) for micro in plan[step]]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        optimizer.zero_grad()
        loss = sum(model(**batch, num_items_in_batch=items).loss for batch in batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def compare(
    ours: Any, theirs: Any, tokenizer: Any, data: list, config: TrainConfig, folder
) -> None:
    from peft import PeftModel

    inject(ours, LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for layer in ours.modules():
        # with B at zero, half of the gradients would be zero at first
        if isinstance(layer, LoRALayer):
            layer.adapters["default"].lora_B.data.normal_(std=0.02, generator=generator)
    save_adapter(ours, folder / "start")
    theirs = PeftModel.from_pretrained(theirs, folder / "start", is_trainable=True)
    expected = train_theirs(theirs, encode_dataset(data, tokenizer, config.max_length), config)
    found = train(ours, tokenizer, data, config)
    assert found.losses == pytest.approx(expected, rel=1e-4)
    # the model learned, so the agreement is meaningful
    assert max(expected) - min(expected) > 0.05 * expected[0]
    theirs.save_pretrained(folder / "end")
    ends = load_file(folder / "end" / "adapter_model.safetensors")
    starts = load_file(folder / "start" / "adapter_model.safetensors")
    for key, tensor in adapter_state_dict(ours).items():
        moved = (ends[key] - starts[key]).norm()
        # Adam turns the noise of tiny gradients into whole steps
        assert (tensor - ends[key]).norm() < 0.02 * moved, key


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_twenty_steps_of_a_tiny_model(name, tmp_path):
    model = oracle(name, vocab_size=len(Letters()), max_position_embeddings=64)
    compare(twin(model), model, Letters(), rows(40), CONFIG, tmp_path)


def test_twenty_steps_of_transformers_own_model_with_our_adapter(tmp_path):
    """Train a model of transformers with our loop and layers."""
    model = oracle(vocab_size=len(Letters()))
    compare(oracle(vocab_size=len(Letters())), model, Letters(), rows(40), CONFIG, tmp_path)


def test_the_frozen_base_keeps_its_dtype(tmp_path):
    """PEFT's preparation for k-bit training casts embeddings, head and norms to fp32.

    That takes twice the memory before the first step.
    """
    from peft import prepare_model_for_kbit_training

    save(tmp_path, dtype=torch.bfloat16, vocab_size=len(Letters()))
    model = load_model(tmp_path, quantize="nf4", dtype="bfloat16", device="cpu")
    inject(model, LoRAConfig(r=4, target_modules="all-linear"))
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, Letters(), rows(8), TrainConfig(max_steps=1, save_steps=None))
    after = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in after.values()} == {torch.bfloat16, torch.uint8}
    assert all(
        p.dtype == before[name].dtype and torch.equal(p, before[name]) for name, p in after.items()
    )
    theirs = prepare_model_for_kbit_training(oracle().bfloat16())
    assert theirs.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.slow
def test_twenty_steps_of_smollm2(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM

    model = load_model(smollm2, dtype=torch.float32, device="cpu")
    save_model(model, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    task = samples.icd10()
    data = list(task.train)[:64]
    compare(
        model,
        theirs,
        load_tokenizer(smollm2),
        data,
        TrainConfig(
            max_steps=STEPS,
            learning_rate=5e-4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        ),
        tmp_path,
    )
