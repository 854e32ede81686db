"""QLoRA fine-tuning in one flat file of plain PyTorch. Read this file first.

Run it with `python examples/train_loop.py`. It teaches a 4-bit chat model to name the ICD-10
chapter of a diagnosis. `ml.train` does the same steps and adds checkpoints, evaluation, logging,
packing and several processes; a test compares the losses of the two.
"""

import os

import torch
import torch.nn.functional as F

import minilora as ml

IGNORE = -100  # a label with this value adds nothing to the loss


def encode(tokenizer, messages):
    """Return the token ids of a conversation, and labels that supervise only its last message."""
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer.encode(text, add_special_tokens=False)
    answer_ids = tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
    answer_ids.append(tokenizer.eos_token_id)  # the model must learn to stop
    return prompt_ids + answer_ids, [IGNORE] * len(prompt_ids) + answer_ids


def collate(examples, pad_id):
    """Pad the examples on the right; return input ids (B, T) and labels (B, T)."""
    length = max(len(ids) for ids, _ in examples)
    input_ids = torch.full((len(examples), length), pad_id)  # (B, T)
    labels = torch.full((len(examples), length), IGNORE)  # (B, T)
    for i, (ids, row_labels) in enumerate(examples):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        labels[i, : len(ids)] = torch.tensor(row_labels)
    return input_ids, labels


def answer_loss(model, batch):
    """Return the mean of -log p(token) over the supervised tokens of a batch."""
    input_ids, labels = batch  # (B, T) each
    logits = model(input_ids)  # (B, T, V): the logits at position t predict token t + 1
    predictions = logits[:, :-1].flatten(0, 1).float()  # (B * (T - 1), V)
    targets = labels[:, 1:].flatten()  # (B * (T - 1),)
    return F.cross_entropy(predictions, targets, ignore_index=IGNORE)


def train_loop(model, batches, pad_id, learning_rate):
    """Train the adapter, one optimiser step a batch; return the loss of each step.

    Args:
        model: the base model with the adapter.
        batches: lists of encoded examples, one list for each step.
        pad_id: token id that fills the shorter rows of a batch.
        learning_rate: learning rate of the first step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]  # only A and B of each layer
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    model.train()
    losses = []
    for step, examples in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / len(batches))  # linear decay to zero
        loss = answer_loss(model, collate(examples, pad_id))
        loss.backward()  # gradients of A and B; the 4-bit weights are frozen
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


def main():
    # 1. A pretrained model in 4 bits (NF4), and low-rank adapters on all its linear layers.
    source = ml.samples.smollm2()  # a Hub id, a folder or a .gguf file works too
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    print(ml.count_parameters(model))

    # 2. Conversations as token ids, in batches of eight.
    batch_size = 8
    steps = 5 if os.environ.get("MINILORA_SHORT") else 60
    task = ml.samples.icd10(train_rows=steps * batch_size)
    examples = [encode(tokenizer, row["messages"]) for row in task.train]
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]

    # 3. Training. B starts at zero, so the first loss is the loss of the base model.
    losses = train_loop(model, batches, tokenizer.pad_token_id or 0, learning_rate=1e-3)
    assert losses[-1] < losses[0]

    # 4. The trained model answers, and the adapter becomes a folder that PEFT can load.
    question = task.test[0]["messages"][:-1]
    answer = ml.generate(model, tokenizer, question, max_new_tokens=6)
    print(question[-1]["content"], "->", answer)
    ml.save_adapter(model, "out/train_loop")


if __name__ == "__main__":
    main()
