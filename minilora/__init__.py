"""minilora: LoRA and QLoRA from scratch, readable and for real use. `__all__` is all that is public.

Importing it is light: torch and our own files. safetensors, tokenizers, jinja2, huggingface_hub, tqdm and every extra
are imported by the functions that need them. The imports below stand here and not behind a lazy `__getattr__`, because
`inject`, `train`, `generate` and `evaluate` are modules too: the function has to be bound last, or
`import minilora.train` anywhere would put the module in its place.
"""

from minilora import plot, samples
from minilora.adapters import (
    adapter_state_dict,
    base_state_dict,
    delete_adapter,
    dequantized,
    disabled_adapters,
    list_adapters,
    load_adapter,
    merge,
    save_adapter,
    use_adapter,
)
from minilora.algebra import Adapter, combine
from minilora.audit.execute import pass_at_1
from minilora.audit.inspect import Inspection, inspect
from minilora.audit.merge_report import MergeReport, merge_report
from minilora.audit.parity import Parity, parity
from minilora.audit.selftest import Selftest, selftest
from minilora.audit.verify import verify
from minilora.card.push import push_to_hub
from minilora.card.write import write_card
from minilora.config import LoRAConfig, TaskType
from minilora.count import ParameterCount, count_parameters
from minilora.data.tokenizer import load_tokenizer
from minilora.engines.rows import adapter_per_row
from minilora.generate import generate
from minilora.inject import eject, inject
from minilora.lora import LoRALayer
from minilora.memory.plan import MemoryPlan, plan_memory
from minilora.mixing import mix, split
from minilora.models.loader import load_model
from minilora.models.save import save_model
from minilora.objectives import DPO, SFT, Classify, Distill, KLToBase
from minilora.ops import plain_ops
from minilora.preview.show import Preview, preview
from minilora.quant import NF4Linear, quantize_model
from minilora.runs.sweep import sweep
from minilora.scoring.evaluate import Scores, evaluate
from minilora.serve import ServeConfig, serve
from minilora.trace.run import trace
from minilora.trace.steps import Trace
from minilora.train import TrainConfig, TrainResult, train
from minilora_kernels import NF4Weight, dequantize_nf4, quantize_nf4

__version__ = "0.1.0"

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
