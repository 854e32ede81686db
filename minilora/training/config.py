"""The configuration of a training run, with the names of TrainingArguments.

The help text of a field is in its metadata, where the command line reads it; next to it is the
field's range. An unknown name raises TypeError with the nearest known names. A value of the wrong
type or outside its range raises ValueError, before anything is loaded.

The default learning rate differs from the 5e-5 of TrainingArguments, which is meant for full
fine-tuning; adapters need a higher rate.
"""

from dataclasses import asdict, dataclass
from typing import Any

from minilora.common import Options, check_options, comma_separated, option, unknown_name

OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
TRACKERS = ("wandb", "tensorboard", "trackio")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class TrainConfig(Options):
    """The options of `train`.

    Every field has the name and the meaning of the field in TrainingArguments or SFTConfig. The
    help text of each field is its documentation.
    """

    # Output and length of the run
    output_dir: str | None = option(
        None, "folder for checkpoints and log.jsonl; None writes nothing"
    )
    method: str = option(
        "lora",
        "lora: train the parameters that require grad (the adapter); full: all of them, in fp32",
        choices=("lora", "full"),
    )
    max_steps: int = option(
        -1, "optimiser steps, cycling over the data; -1 follows num_train_epochs", low=-1
    )
    num_train_epochs: float = option(3.0, "passes over the data if max_steps is -1", above=0)

    # Batches
    per_device_train_batch_size: int = option(8, "samples in one forward pass", low=1)
    per_device_eval_batch_size: int = option(
        8, "samples in one evaluation pass; changes no result", low=1
    )
    gradient_accumulation_steps: int = option(1, "forward passes in one optimiser step", low=1)

    # Optimiser and schedule
    optim: str = option(
        "adamw_torch",
        "AdamW with moments in fp32, or in 8 bits (paged: in host memory)",
        choices=OPTIMIZERS,
    )
    learning_rate: float = option(2e-4, "AdamW's peak learning rate", low=0)
    loraplus_lr_ratio: float = option(
        1.0, "LoRA+: learning rate of B as a multiple of that of A", above=0
    )
    lr_scheduler_type: str = option(
        "linear", "shape of the learning rate after the warm-up", choices=SCHEDULES
    )
    warmup_ratio: float = option(
        0.0, "share of all steps over which the learning rate rises", low=0, high=1
    )
    warmup_steps: int = option(0, "number of steps over which the learning rate rises", low=0)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay, for matrices only", low=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient", low=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's decay of the mean squared gradient", low=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's guard against division by zero", above=0)
    max_grad_norm: float = option(
        1.0, "largest gradient norm; longer gradients are scaled down; 0 never clips", low=0
    )
    neftune_noise_alpha: float = option(
        0.0, "NEFTune: strength of the noise on embeddings in training", low=0
    )

    # Data
    max_length: int = option(
        1024, "largest number of tokens of a sample; longer ones are cut and reported", low=2
    )
    packing: bool = option(
        False, "join samples into rows of max_length tokens; no sample attends to another"
    )
    dataset_cache: str | None = option(
        None, "folder where tokenised dataset files are kept for the next run"
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None,
        "variables of the chat template, such as enable_thinking; None: those that the adapter was "
        "trained with, if any",
    )
    group_by_length: bool = option(True, "batch samples of similar length: less padding")

    # Memory and precision
    gradient_checkpointing: bool = option(
        False, "recompute activations in backward: less memory, more time"
    )
    fsdp: bool = option(
        False, "shard the model over the processes (FSDP2) instead of copying it to each"
    )
    bf16: bool | None = option(
        None, "compute an fp32 model in bfloat16 (autocast); None follows the model's dtype"
    )
    fp16: bool | None = option(
        None, "compute an fp32 model in float16, with loss scaling; None follows the model's dtype"
    )

    # Logs, evaluation and checkpoints
    logging_steps: int = option(10, "steps between two lines of the log", low=1)
    report_to: str | None = option(
        None, "further logs, separated by commas: wandb, tensorboard, trackio"
    )
    eval_steps: int | None = option(
        None, "steps between two evaluations; None evaluates at the end only", low=1
    )
    eval_metrics: str | None = option(
        None, "metrics of greedy answers, separated by commas: exact_match, token_f1, json_valid"
    )
    eval_answers: int = option(
        64, "number of eval rows, from the first on, that are answered for eval_metrics", low=1
    )
    metric_for_best_model: str = option("eval_loss", "figure of an evaluation that ranks the steps")
    load_best_model_at_end: bool = option(
        False, "end with the weights of the best evaluated step; keeps its checkpoint"
    )
    early_stopping_patience: int | None = option(
        None, "evaluations without an improvement after which the run stops", low=1
    )
    save_steps: int | None = option(
        500, "steps between two checkpoints; None saves at the end only", low=1
    )
    save_total_limit: int | None = option(
        None, "number of checkpoints to keep; None keeps all", low=1
    )
    resume_from_checkpoint: str | None = option(
        None, 'checkpoint folder, or "last" for the newest in output_dir'
    )
    seed: int = option(42, "seed of the order of the data and of the dropout", low=0, below=2**31)
    disable_tqdm: bool | None = option(
        None, "hide the progress: a bar, or one line every logging_steps where there is no terminal"
    )

    def __post_init__(self):
        check_options(self)
        if self.max_steps == 0:
            raise ValueError(
                "max_steps: expected at least 1, or -1 to follow num_train_epochs, got 0."
            )
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                "warmup_ratio and warmup_steps are both set, and only one applies: leave one at 0."
            )
        if self.bf16 and self.fp16:
            raise ValueError(
                "bf16 and fp16 are both True: choose one, or neither to follow the model's dtype."
            )
        if self.output_dir is None and self.resume_from_checkpoint == "last":
            raise ValueError(
                'resume_from_checkpoint="last" searches output_dir, which is None: set output_dir.'
            )
        for name in self.trackers:
            if name not in TRACKERS:
                raise unknown_name("report_to", name, TRACKERS)

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`; "none" counts as no name, as in transformers."""
        return [name for name in comma_separated(self.report_to) if name != "none"]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values."""
        return asdict(self)
