"""Facts about this machine and installation, for a bug report.

Tokens are never shown, and neither is the name of the user: the home folder is printed as ~.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from minilora.common import __version__
from minilora.models.loader import fast_dtype
from minilora_kernels.backend import ENVIRONMENT, path_for
from minilora_kernels.c import bindings, nf4
from minilora_kernels.c.compiler import cache_folder, machine_flags

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "huggingface_hub")
# Instruction sets that the code of torch and of minilora can use, as /proc/cpuinfo names them.
INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "asimd", "sve", "bf16"),
)
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CC", "XDG_CACHE_HOME"),
    *("TOKENIZERS_PARALLELISM", "LOCAL_RANK", "WORLD_SIZE"),
)
PREFIXES = ("MINILORA_", "HF_", "TRITON_", "PYTORCH_", "TORCH_", "NCCL_")
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH")
_GIB = 2**30


@dataclass(frozen=True)
class Environment:
    """Facts about a machine and an installation; prints as text.

    Attributes:
        sections: heading -> name -> value.
    """

    sections: Mapping[str, Mapping[str, str]]

    def __str__(self) -> str:
        lines = []
        for heading, facts in self.sections.items():
            lines.append(heading)
            lines += [f"  {name:<22}{value}" for name, value in facts.items()]
        return _without_user("\n".join(lines))


def environment() -> Environment:
    """Describe this machine and installation, to copy into a bug report.

    The C code is compiled if it is not in the cache yet, so that the report states what runs.

    Returns:
        Versions, processor, GPUs, the dtype that "auto" chooses, the code that runs, caches and
        environment variables.
    """
    return Environment(
        {
            "versions": _versions(),
            "machine": _machine(),
            "choices": _choices(),
            "caches": _caches(),
            "environment variables": _variables(os.environ),
        }
    )


def _versions() -> dict[str, str]:
    facts = {"minilora": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        facts[name] = _version(name) or "not installed"
    extras = []
    for name in _optional_packages():
        installed = _version(name)
        if installed is not None:
            extras.append(f"{name} {installed}")
    facts["optional packages"] = ", ".join(extras) or "none"
    return facts


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _optional_packages() -> list[str]:
    """Return the packages of minilora's extras, as its metadata lists them."""
    try:
        listed = requires("minilora") or []
    except PackageNotFoundError:  # run from a source tree that is not installed
        return []
    names = []
    for requirement in listed:
        name = re.split(r"[\s;\[<>=!~]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == .(\w+)", requirement)
        if extra is not None and extra[1] not in ("docs", "dev", "all"):
            names.append(name)
    return sorted({*names} - {"minilora"})  # an extra can name other extras: minilora[gguf]


def _machine() -> dict[str, str]:
    name, instructions = _processor()
    facts = {
        "system": platform.platform(),
        "processor": name,
        "instruction sets": instructions,
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads in torch",
        "memory": _memory(),
    }
    if not torch.cuda.is_available():
        facts["GPU"] = "none that torch can use"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{gpu.name}, {gpu.total_memory / _GIB:.1f} GiB, capability {gpu.major}.{gpu.minor}"
        )
    facts["torch was built for"] = _build()
    return facts


def _processor() -> tuple[str, str]:
    """Return the name of the processor, and the instruction sets that matter here."""
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() in ("flags", "Features"):
                flags.update(value.split())
    known = [flag for flag in INSTRUCTIONS if flag in flags]
    shown = " ".join(known) or "unknown"
    return name, f"{shown} (torch uses {torch.backends.cpu.get_cpu_capability()})"


def _memory() -> str:
    """Return the memory of the machine, and the limit of its container if there is one."""
    shown = "unknown"
    with suppress(ValueError, OSError, AttributeError):  # not on Windows
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        shown = f"{total / _GIB:.1f} GiB"
    with suppress(OSError, ValueError):  # "max" is not a number: there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        shown += f", limited to {limit / _GIB:.1f} GiB"
    return shown


def _build() -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "CPU"


def _choices() -> dict[str, str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, reason = fast_dtype(device)
    facts = {
        "device": str(device),
        'dtype="auto"': f"{name}: {reason}",
        "C compiler": _compiler(),
    }
    try:
        path = path_for(device)
    except ValueError as error:
        facts["NF4"] = str(error)
        return facts
    compiled = path == "cpu" and ENVIRONMENT not in os.environ and nf4.ready()
    facts["NF4"] = {"triton": "Triton kernels", "reference": "plain torch (reference)"}.get(
        path, "compiled C" if compiled else "plain torch"
    )
    facts["model operations"] = _operations(path, device, getattr(torch, name))
    return facts


def _operations(path: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the code that runs norms, RoPE, attention and losses."""
    if not bindings.wanted():
        return "plain torch (MINILORA_STEPS)"
    if path == "triton":
        return "Triton kernels"
    if device.type == "cpu" and bindings.ready(dtype):
        return f"compiled C, {dtype}".replace("torch.", "")
    return "plain torch"


def _compiler() -> str:
    """Return the path, version and machine options of the C compiler."""
    program = shutil.which(os.environ.get("CC", "cc"))
    if program is None:
        return "none: plain torch runs in its place"
    try:
        shown = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{program}: --version fails ({error})"
    lines = shown.splitlines() or [""]
    return f"{program} ({lines[0]}), {machine_flags()}"


def _caches() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = {"minilora": cache_folder(), "Hub": Path(HF_HUB_CACHE)}
    folders["Triton"] = Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser()
    return {name: _folder_size(folder) for name, folder in folders.items()}


def _folder_size(folder: Path) -> str:
    """Return a folder and its size; links are not followed."""
    if not folder.is_dir():
        return f"{folder} (does not exist)"
    size = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with suppress(OSError):  # the file was deleted after the folder was listed
                size += os.lstat(os.path.join(root, file)).st_size
    return f"{folder} ({size / 1e9:.3f} GB)"


def _variables(values: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that change what minilora does; of a secret, only that it is set."""
    facts = {}
    for name in sorted(values):
        if name not in VARIABLES and not name.startswith(PREFIXES):
            continue
        secret = _SECRET.search(name) is not None or "@" in values[name]
        facts[name] = "(set, not shown)" if secret else values[name]
    return facts or {"none": "of those that minilora reads is set"}


def _without_user(text: str) -> str:
    """Replace the home folder by ~, and the user's name in other paths."""
    home = Path.home()
    if len(home.parts) > 1:
        text = re.sub(rf"{re.escape(str(home))}(?![\w-])", "~", text)
        text = re.sub(rf"(?<=/){re.escape(home.name)}(?![\w-])", "USER", text)
    return text
