"""Errors for a name that matches nothing, with the nearest names."""

import difflib
from collections.abc import Iterable

# Names of other libraries, programs and models -> ours
FOREIGN_NAMES = {
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "alpha": "lora_alpha",
    "batch_size": "per_device_train_batch_size",
    "block_size": "max_length",
    "clip_grad": "max_grad_norm",
    "column_mapping": "columns",
    "cutoff_len": "max_length",
    "delimiter": "separator",
    "dora": "use_dora",
    "dropout": "lora_dropout",
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "eval_data": "eval_dataset",
    "eval_file": "eval_dataset",
    "eval_split": "test_size",
    "grad_accum": "gradient_accumulation_steps",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "grad_checkpoint": "gradient_checkpointing",
    "gradient_clipping": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "iters": "max_steps",
    "key": "k_proj",
    "load_in_4bit": "quantize",
    "lora_modules": "target_modules",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "lr_schedule": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "max_iters": "max_steps",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "model_max_length": "max_length",
    "n_epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "out_dir": "output_dir",
    "output": "output_dir",
    "qlora": "quantize",
    "quantization": "quantize",
    "quantization_bit": "quantize",
    "query": "q_proj",
    "random_seed": "seed",
    "rank": "r",
    "rslora": "use_rslora",
    "save_dir": "output_dir",
    "scheduler": "lr_scheduler_type",
    "seq_len": "max_length",
    "sequence_len": "max_length",
    "sep": "separator",
    "steps": "max_steps",
    "system_message": "system",
    "system_prompt": "system",
    "targets": "target_modules",
    "train_batch_size": "per_device_train_batch_size",
    "use_4bit": "quantize",
    "val_data": "eval_dataset",
    "val_set": "eval_dataset",
    "val_set_size": "test_size",
    "val_size": "test_size",
    "validation_split": "test_size",
    "value": "v_proj",
    "wd": "weight_decay",
}


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return the candidates that are most similar to a name, best first.

    If another library uses the name for one of the candidates, this candidate is the only result.

    Args:
        name: The name that was not found.
        candidates: Possible names. Module paths are also compared by their last part.
        n: Largest number of results.
    """
    candidates = list(dict.fromkeys(candidates))
    last_parts = list(dict.fromkeys(candidate.rpartition(".")[2] for candidate in candidates))
    ours = FOREIGN_NAMES.get(name.lower().replace("-", "_"))
    if ours in last_parts:
        return [ours]
    similar = difflib.get_close_matches(name, candidates, n)
    if similar:
        return similar
    return difflib.get_close_matches(name, last_parts, n, cutoff=0.0)  # the best, however far


def unknown_name(kind: str, name: str, candidates: Iterable[str]) -> ValueError:
    """Return a ValueError for a name that matches nothing, with the nearest names.

    Args:
        kind: The option or kind of thing that was named.
        name: The name that matches nothing.
        candidates: The names that exist.
    """
    candidates = list(candidates)
    if not candidates:
        return ValueError(f"{kind}: {name!r} matches nothing. There are none.")
    names = ", ".join(map(repr, nearest(name, candidates)))
    return ValueError(f"{kind}: {name!r} matches nothing. Nearest: {names}.")
