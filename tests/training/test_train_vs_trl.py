"""Proves that supervised fine-tuning with minilora equals fine-tuning with TRL.

From the same adapter file and the same tokens both have the same twenty losses and the same
adapter. TRL's SFTTrainer does everything else: batches, masks, loss, AdamW, schedule.
"""

import pytest
import torch

from helpers.objective_laws import stirred
from helpers.tiny import oracle, twin
from helpers.toy import Letters, lora, rows
from minilora.data import encode_dataset
from minilora.lora.files.save_load import adapter_state_dict, save_adapter
from minilora.training.batch_sampler import BatchPlan
from minilora.training.config import TrainConfig
from minilora.training.loop import train
from tests.losses.test_dpo import word_tokenizer

STEPS = 20
CONFIG = TrainConfig(
    max_steps=STEPS,
    learning_rate=5e-3,
    warmup_steps=3,
    lr_scheduler_type="cosine",
    weight_decay=0.05,
    per_device_train_batch_size=3,
    gradient_accumulation_steps=2,
    group_by_length=False,
)


def test_twenty_steps_of_sft_trainer(tmp_path):
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    base = oracle(vocab_size=len(Letters()), max_position_embeddings=64)
    ours = stirred(lora(twin(base)))
    save_adapter(ours, tmp_path / "start")
    theirs = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    start = {key: tensor.clone() for key, tensor in adapter_state_dict(ours).items()}
    examples = encode_dataset(rows(42), Letters(), 64)
    plan = BatchPlan([len(example) for example in examples], CONFIG)
    order = [i for step in range(STEPS) for micro in plan[step] for i in micro]
    # no smaller step at the end of an epoch, where TRL would cut its batches differently
    assert len(order) == STEPS * 6
    tokens = [
        {
            "input_ids": examples[i].input_ids,
            "completion_mask": [int(y != -100) for y in examples[i].labels],
        }
        for i in order
    ]
    arguments = SFTConfig(
        str(tmp_path / "trl"),
        max_steps=STEPS,
        learning_rate=CONFIG.learning_rate,
        warmup_steps=CONFIG.warmup_steps,
        lr_scheduler_type=CONFIG.lr_scheduler_type,
        weight_decay=CONFIG.weight_decay,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        theirs,
        args=arguments,
        train_dataset=Dataset.from_list(tokens),
        processing_class=word_tokenizer(PreTrainedTokenizerFast),
    )
    trainer.train()
    expected = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    found = train(ours, Letters(), rows(42), CONFIG).losses
    assert found == pytest.approx(expected, rel=1e-4)
    # the model learned, so the agreement is meaningful
    assert max(expected) - min(expected) > 0.05 * expected[0]
    ends = {
        name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad
    }
    for key, tensor in adapter_state_dict(ours).items():
        moved = (ends[key] - start[key]).norm()
        # Adam turns the noise of tiny gradients into whole steps
        assert torch.norm(tensor - ends[key]) < 0.02 * moved, key
