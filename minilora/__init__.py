"""minilora: LoRA and QLoRA from scratch, readable and for real use. `__all__` is all that is public.

Importing it is light: torch and our own files. safetensors, tokenizers, jinja2, huggingface_hub, tqdm and every extra
are imported by the functions that need them.
"""

from minilora import data, losses
from minilora.common import __version__ as __version__
from minilora.data.chat.tool_calls import parse_tool_calls
from minilora.data.mixture import mix_datasets, train_test_split
from minilora.data.preview import Preview, preview
from minilora.data.sources.load_dataset import load_dataset
from minilora.data.tokenizer import load_tokenizer
from minilora.evaluation import samples
from minilora.evaluation.code_execution import pass_at_1
from minilora.evaluation.evaluate import evaluate
from minilora.evaluation.scores import ScoredRow, Scores, ScoresComparison
from minilora.generation.config import GenerationConfig
from minilora.generation.generate import generate
from minilora.generation.stream import stream_generate
from minilora.lora.active import delete_adapter, disable_adapters, list_adapters, set_adapter
from minilora.lora.batched import per_row_adapters
from minilora.lora.config import LoRAConfig, TaskType
from minilora.lora.files.save_load import (
    adapter_state_dict,
    base_state_dict,
    load_adapter,
    save_adapter,
)
from minilora.lora.inject import eject, inject
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.arithmetic import AdapterWeights
from minilora.lora.merging.combine import combine_adapters
from minilora.lora.merging.merge import dequantized_weights, merge
from minilora.losses import (
    DPO,
    GRPO,
    SFT,
    Classify,
    Distill,
    KLToBase,
    OnPolicyDistill,
    RewardModel,
)
from minilora.models.gguf.adapter import save_gguf_adapter
from minilora.models.loader import load_model
from minilora.models.padded_batch import inference
from minilora.models.parameter_count import ParameterCount, count_parameters
from minilora.models.resize import resize_embeddings
from minilora.models.save import save_model
from minilora.quant.nf4_linear import NF4Linear
from minilora.quant.quantize_model import quantize_model
from minilora.serving.config import ServeConfig
from minilora.serving.serve import serve
from minilora.tools import plot
from minilora.tools.check_training import TrainingCheck, check_training
from minilora.tools.compare_exports import ExportComparison, compare_exports
from minilora.tools.compare_runs import RunComparison, compare_runs
from minilora.tools.environment import Environment, environment
from minilora.tools.inspect import Inspection, inspect
from minilora.tools.memory_plan.plan import MemoryPlan, plan_memory
from minilora.tools.merge_report import MergeReport, merge_report
from minilora.tools.model_card import write_model_card
from minilora.tools.push_to_hub import push_to_hub
from minilora.tools.sweep import sweep, sweep_table
from minilora.tools.trace.run import trace
from minilora.tools.trace.steps import Trace
from minilora.tools.verify import verify
from minilora.training.config import TrainConfig
from minilora.training.logs.callbacks import Callback, StepInfo
from minilora.training.logs.result import TrainResult
from minilora.training.loop import train
from minilora.training.session import TrainingSession
from minilora_kernels import NF4Weight, dequantize_nf4, quantize_nf4
from minilora_kernels.ops.mode import reference_ops

LoraConfig = LoRAConfig  # PEFT's spelling: a tutorial runs with the import changed


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "AdapterWeights",
    "Callback",
    "Classify",
    "DPO",
    "Distill",
    "Environment",
    "ExportComparison",
    "GRPO",
    "GenerationConfig",
    "Inspection",
    "KLToBase",
    "LoRAConfig",
    "LoRALayer",
    "LoraConfig",
    "MemoryPlan",
    "MergeReport",
    "NF4Linear",
    "NF4Weight",
    "OnPolicyDistill",
    "ParameterCount",
    "Preview",
    "RewardModel",
    "RunComparison",
    "SFT",
    "ScoredRow",
    "Scores",
    "ScoresComparison",
    "ServeConfig",
    "StepInfo",
    "TaskType",
    "Trace",
    "TrainConfig",
    "TrainResult",
    "TrainingCheck",
    "TrainingSession",
    "adapter_state_dict",
    "base_state_dict",
    "check_training",
    "combine_adapters",
    "compare_exports",
    "compare_runs",
    "count_parameters",
    "data",
    "delete_adapter",
    "dequantize_nf4",
    "dequantized_weights",
    "disable_adapters",
    "eject",
    "environment",
    "evaluate",
    "generate",
    "inference",
    "inject",
    "inspect",
    "list_adapters",
    "load_adapter",
    "load_dataset",
    "load_model",
    "load_tokenizer",
    "losses",
    "merge",
    "merge_report",
    "mix_datasets",
    "parse_tool_calls",
    "pass_at_1",
    "per_row_adapters",
    "plan_memory",
    "plot",
    "preview",
    "push_to_hub",
    "quantize_model",
    "quantize_nf4",
    "reference_ops",
    "resize_embeddings",
    "samples",
    "save_adapter",
    "save_gguf_adapter",
    "save_model",
    "serve",
    "set_adapter",
    "stream_generate",
    "sweep",
    "sweep_table",
    "trace",
    "train",
    "train_test_split",
    "verify",
    "write_model_card",
]
