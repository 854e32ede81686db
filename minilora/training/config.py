"""What a training run is told: TrainingArguments' names, each with its help and its range in one line.

The help text lives in the field's metadata, where the command line finds it. An unknown name raises TypeError with
the nearest known ones, a value of the wrong type or outside its range ValueError, before anything is loaded. The
learning rate's default differs from TrainingArguments' 5e-5, which is meant for full fine-tuning: adapters take more.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from minilora.common import check_options, nearest, option, unknown

OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
TRACKERS = ("wandb", "tensorboard", "trackio")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; every field keeps its TrainingArguments (or SFTConfig) name and meaning."""

    output_dir: str | None = option(None, "folder for checkpoints and log.jsonl; None writes nothing")
    method: str = option(
        "lora", "lora: what requires grad trains, the adapter; full: every parameter, in fp32", choices=("lora", "full")
    )
    max_steps: int = option(-1, "optimiser steps, cycling over the data; -1 follows num_train_epochs", low=-1)
    num_train_epochs: float = option(3.0, "passes over the data, where max_steps is -1", above=0)
    per_device_train_batch_size: int = option(8, "samples in one forward pass", low=1)
    per_device_eval_batch_size: int = option(8, "samples in one evaluation pass; changes no result", low=1)
    gradient_accumulation_steps: int = option(1, "forward passes in one optimiser step", low=1)
    optim: str = option(
        "adamw_torch", "AdamW with moments in fp32, or in 8 bits (paged: in host memory)", choices=OPTIMIZERS
    )
    learning_rate: float = option(2e-4, "AdamW's peak learning rate", low=0)
    loraplus_lr_ratio: float = option(1.0, "LoRA+: B's learning rate as a multiple of A's", above=0)
    lr_scheduler_type: str = option("linear", "how the learning rate falls after the warm-up", choices=SCHEDULES)
    warmup_ratio: float = option(0.0, "share of all steps over which the learning rate rises", low=0, high=1)
    warmup_steps: int = option(0, "the same as a number of steps", low=0)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay, of matrices", low=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient", low=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's decay of the mean squared gradient", low=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's guard against division by zero", above=0)
    max_grad_norm: float = option(1.0, "longest gradient, longer ones are scaled down; 0 never clips", low=0)
    neftune_noise_alpha: float = option(0.0, "NEFTune: noise of this strength on embeddings in training", low=0)
    max_length: int = option(1024, "tokens of a sample; what is longer is cut, and reported", low=2)
    packing: bool = option(False, "several samples in a row of max_length tokens, none of which sees another")
    dataset_cache: str | None = option(None, "folder where tokenised dataset files are kept for the next run")
    group_by_length: bool = option(True, "put samples of similar length together: less padding")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, more time")
    fsdp: bool = option(False, "processes hold the model in shards (FSDP2), not a copy each; one process: no effect")
    bf16: bool | None = option(None, "compute a fp32 model in bfloat16 (autocast); None follows the model's dtype")
    fp16: bool | None = option(None, "the same in float16, with loss scaling; None follows the model's dtype")
    logging_steps: int = option(10, "steps between two lines of the log", low=1)
    report_to: str | None = option(None, "further logs, with commas: wandb, tensorboard, trackio")
    eval_steps: int | None = option(None, "steps between two evaluations; None evaluates at the end only", low=1)
    eval_metrics: str | None = option(None, "of greedy answers, with commas: exact_match, token_f1, json_valid")
    eval_answers: int = option(64, "eval rows that are answered for eval_metrics: the first so many", low=1)
    metric_for_best_model: str = option("eval_loss", "which figure of an evaluation says how good a step is")
    load_best_model_at_end: bool = option(False, "end with the best evaluated step's weights; keeps its checkpoint")
    early_stopping_patience: int | None = option(None, "stop after so many evaluations without a better one", low=1)
    save_steps: int | None = option(500, "steps between two checkpoints; None saves at the end only", low=1)
    save_total_limit: int | None = option(None, "how many checkpoints to keep; None keeps all", low=1)
    resume_from_checkpoint: str | None = option(None, 'a checkpoint folder, or "last" for the newest in output_dir')
    seed: int = option(42, "fixes the order of the data and the dropout", low=0, below=2**31)
    disable_tqdm: bool | None = option(None, "no progress bar; None shows it on a terminal only")

    def __new__(cls, *args: Any, **given: Any):  # before __init__, whose TypeError knows no nearest names
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"TrainConfig has no field {name!r}. Nearest: {', '.join(nearest(name, known))}.")
        return super().__new__(cls)

    def __post_init__(self):
        check_options(self)
        if self.max_steps == 0:
            raise ValueError("max_steps: expected at least 1, or -1 to follow num_train_epochs, got 0.")
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError("warmup_ratio and warmup_steps are both set and only one can hold: leave one at 0.")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both True: choose one, or neither to follow the model's dtype.")
        if self.output_dir is None and self.resume_from_checkpoint == "last":
            raise ValueError('resume_from_checkpoint="last" looks into output_dir, which is None: set output_dir.')

        for name in self.trackers:
            if name not in TRACKERS:
                raise unknown("report_to", name, TRACKERS)

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`; transformers' "none" is none."""
        names = [name.strip() for name in (self.report_to or "").split(",")]
        return [name for name in names if name not in ("", "none")]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
