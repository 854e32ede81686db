"""minilora: LoRA and QLoRA from scratch, readable and for real use. `__all__` is all that is public.

Importing it is light: torch and our own files. safetensors, tokenizers, jinja2, huggingface_hub, tqdm and every extra
are imported by the functions that need them.
"""

from minilora.common import __version__ as __version__
from minilora.data.mixture import mix, split
from minilora.data.preview import Preview, preview
from minilora.data.tokenizer import load_tokenizer
from minilora.evaluation import samples
from minilora.evaluation.code_execution import pass_at_1
from minilora.evaluation.evaluate import Scores, evaluate
from minilora.generation.generate import generate
from minilora.lora.active import delete_adapter, disabled_adapters, list_adapters, use_adapter
from minilora.lora.batched import adapter_per_row
from minilora.lora.config import LoRAConfig, TaskType
from minilora.lora.files.save_load import adapter_state_dict, base_state_dict, load_adapter, save_adapter
from minilora.lora.inject import eject, inject
from minilora.lora.layer import LoRALayer
from minilora.lora.merging.arithmetic import Adapter, combine
from minilora.lora.merging.merge import dequantized, merge
from minilora.losses import DPO, SFT, Classify, Distill, KLToBase
from minilora.models.loader import load_model
from minilora.models.parameter_count import ParameterCount, count_parameters
from minilora.models.save import save_model
from minilora.quant.nf4_linear import NF4Linear, quantize_model
from minilora.serving.config import ServeConfig
from minilora.serving.serve import serve
from minilora.tools import plot
from minilora.tools.check_training import Selftest, selftest
from minilora.tools.compare_exports import Parity, parity
from minilora.tools.inspect import Inspection, inspect
from minilora.tools.memory_plan.plan import MemoryPlan, plan_memory
from minilora.tools.merge_report import MergeReport, merge_report
from minilora.tools.model_card import write_card
from minilora.tools.push_to_hub import push_to_hub
from minilora.tools.sweep import sweep
from minilora.tools.trace.run import trace
from minilora.tools.trace.steps import Trace
from minilora.tools.verify import verify
from minilora.training.config import TrainConfig
from minilora.training.loop import TrainResult, train
from minilora_kernels import NF4Weight, dequantize_nf4, quantize_nf4
from minilora_kernels.ops.mode import plain_ops

LoraConfig = LoRAConfig  # PEFT's spelling: a tutorial runs with the import changed


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Adapter",
    "Classify",
    "DPO",
    "Distill",
    "Inspection",
    "KLToBase",
    "LoRAConfig",
    "LoRALayer",
    "LoraConfig",
    "MemoryPlan",
    "MergeReport",
    "NF4Linear",
    "NF4Weight",
    "ParameterCount",
    "Parity",
    "Preview",
    "SFT",
    "Scores",
    "Selftest",
    "ServeConfig",
    "TaskType",
    "Trace",
    "TrainConfig",
    "TrainResult",
    "adapter_per_row",
    "adapter_state_dict",
    "base_state_dict",
    "combine",
    "count_parameters",
    "delete_adapter",
    "dequantize_nf4",
    "dequantized",
    "disabled_adapters",
    "eject",
    "evaluate",
    "generate",
    "inject",
    "inspect",
    "list_adapters",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge",
    "merge_report",
    "mix",
    "parity",
    "pass_at_1",
    "plain_ops",
    "plan_memory",
    "plot",
    "preview",
    "push_to_hub",
    "quantize_model",
    "quantize_nf4",
    "samples",
    "save_adapter",
    "save_model",
    "selftest",
    "serve",
    "split",
    "sweep",
    "trace",
    "train",
    "use_adapter",
    "verify",
    "write_card",
]
