"""Proves the statements of the planner about a memory limit, and the note when memory runs out.

The statements are the largest value that fits, the changes that fit, and the worked examples. The
worked examples use Llama's own sizes, written here; the documentation takes its figures from these
plans.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from helpers.source import ROOT, text
from helpers.tiny import python
from helpers.toy import FAST, Letters, Wrapped, llama, lora, rows
from minilora.cli.main import main
from minilora.losses.sft import SFT
from minilora.tools.memory_plan.fit import largest, parse_bytes
from minilora.tools.memory_plan.plan import PARTS
from minilora.tools.memory_plan.shortage import explain

ALL = ml.LoRAConfig(r=16, target_modules="all-linear")
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
LLAMA_7B = LLAMA | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
}
LLAMA_7B |= {"num_attention_heads": 32, "max_position_embeddings": 4096}
LLAMA_65B = LLAMA_7B | {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80}
LLAMA_65B |= {"num_attention_heads": 64, "max_position_embeddings": 2048}
LLAMA_3_8B = LLAMA_7B | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}
LLAMA_3_8B |= {"max_position_embeddings": 8192, "rope_theta": 500000.0}
TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
}
TINY |= {"num_attention_heads": 4, "max_position_embeddings": 256}
ONE = ml.TrainConfig(per_device_train_batch_size=1, max_length=512, gradient_checkpointing=True)


def plan(shape: dict, config: ml.TrainConfig = ONE, **how) -> ml.MemoryPlan:
    return ml.plan_memory(
        shape, how.pop("lora", ALL), config, **{"dtype": "bfloat16", "quantize": "nf4"} | how
    )


# ---- oracle: worked examples


@pytest.mark.parametrize(
    "targets, trainable",
    [
        (["q_proj", "v_proj"], 6_815_744),
        pytest.param(["q_proj", "k_proj", "v_proj", "o_proj"], 13_631_488, marks=pytest.mark.slow),
        ("all-linear", 41_943_040),
    ],
)
def test_trainable_parameters_of_llama_3_8b_at_rank_16(targets, trainable: int):
    found = plan(LLAMA_3_8B, lora=ml.LoRAConfig(r=16, target_modules=targets))
    assert found.trainable == trainable
    assert found.adapters == 4 * trainable  # fp32 masters
    # two moments, and a count for each tensor
    assert 0 <= found.optimizer - 8 * trainable < 4 * 2 * 32 * 7 + 1


def test_7b_on_6_16_and_24_gb():
    """4 bits fit 6 GB, and 16 bits fit 16 GB with checkpointing or 24 GB without, at this length.

    Training every parameter fits none of them.
    """
    assert (
        plan(LLAMA_7B).total
        < parse_bytes("6GB")
        < plan(LLAMA_7B, quantize=None).total
        < parse_bytes("16GB")
    )
    assert plan(
        LLAMA_7B, replace(ONE, gradient_checkpointing=False), quantize=None
    ).total < parse_bytes("24GB")
    full = ml.plan_memory(LLAMA_7B, config=replace(ONE, method="full", bf16=True))
    # bytes of a parameter: 4 for the weight, 4 for the gradient, 8 for the moments
    assert full.total > 16 * full.trainable > parse_bytes("100GB")


@pytest.mark.slow
def test_65b_on_48_gb():
    """QLoRA trains 65B parameters on 48 GB, with r = 64 on every linear layer.

    The moments are in host memory, as in the paper (arXiv 2305.14314, §4).
    """
    config = replace(ONE, optim="paged_adamw_8bit")
    found = plan(LLAMA_65B, config, lora=replace(ALL, r=64))
    assert (
        found.total
        < parse_bytes("48GB")
        < plan(LLAMA_65B, config, quantize=None, lora=replace(ALL, r=64)).total
    )
    assert (
        found.optimizer
        == 0
        < plan(LLAMA_65B, replace(ONE, optim="adamw_8bit"), lora=replace(ALL, r=64)).optimizer
    )


def test_paged_moments_are_in_host_memory():
    paged, kept = (
        plan(TINY, replace(ONE, optim=optim)) for optim in ("paged_adamw_8bit", "adamw_8bit")
    )
    assert paged.optimizer == 0 < kept.optimizer
    assert paged.total < kept.total


# ---- property: the inverse


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(-5, 500), st.integers(1, 60)
)
def test_the_largest_that_fits(rises: list[int], limit: int, start: int):
    """Compare with a search of all values, for totals that rise irregularly."""
    totals = [sum(rises[: n + 1]) for n in range(len(rises))]
    found = largest(lambda n: totals[n - 1], limit, min(start, len(totals)), len(totals))
    assert found == sum(total <= limit for total in totals)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, unit", [("max_length", 8), ("per_device_train_batch_size", 1), ("r", 1)]
)
def test_one_more_does_not_fit(name: str, unit: int):
    found = plan(TINY, replace(ONE, max_length=100))
    limit = (
        found.changed(**{name: 6 * unit}).total
        + (found.changed(**{name: 7 * unit}).total - found.total) // 20
    )
    most = found.most(name, limit)
    assert found.changed(**{name: most}).total <= limit < found.changed(**{name: most + unit}).total
    assert found.most(name, 1000) == 0


def test_most_is_limited_by_the_shape_of_the_model():
    """The positions limit a length, and the narrowest layer limits a rank."""
    found = plan(TINY)
    assert (found.most("max_length", "1GB"), found.most("r", "1GB")) == (256, 64)


@pytest.mark.slow
def test_changes_that_fit_come_smallest_first():
    wide = replace(ALL, r=64)  # moments of fewer than 4,096 numbers stay in fp32
    found = plan(
        TINY,
        ml.TrainConfig(per_device_train_batch_size=8, max_length=256),
        quantize=None,
        lora=wide,
    )
    fixes = found.fixes(found.total - 1)
    names = [re.match(r"\w+", words)[0] for words in fixes]
    assert names == [
        "per_device_train_batch_size",
        "gradient_checkpointing",
        "optim",
        "quantize",
        "max_length",
    ]
    assert all(other.total < found.total for other in fixes.values())
    assert next(iter(fixes)) == "per_device_train_batch_size=4, gradient_accumulation_steps=2"
    assert not found.fixes(1000)
    tight = found.fixes(found.total // 4)
    assert 0 < len(tight) < 5 and all(other.total <= found.total // 4 for other in tight.values())


def test_parts_add_up_and_are_shown():
    found = plan(TINY, card=1000)
    assert found.total == sum(getattr(found, part) for part in PARTS)
    shown = str(found)
    assert f"{found.trainable:,}" in shown and found.moment in shown
    assert "does not fit 0.0 GB" in shown and "no single change" in shown


def test_sizes_are_read():
    assert [parse_bytes(size) for size in (5, "24GB", "1.5 GiB", "80gb")] == [
        5,
        24 * 10**9,
        3 * 2**29,
        80 * 10**9,
    ]


# ---- the command line and the picture


@pytest.mark.slow
def test_the_command_draws_and_compares(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    options = ["--r", "4", "--batch", "2", "--max_length", "64", "--dtype", "bfloat16"]
    assert main(["plan", str(tmp_path), *options, "--plot", str(tmp_path / "plan.png")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"qlora +lora +full", shown)
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["plan", str(tmp_path), *options, "--quantize", "nf4", "--card", "20MB"]) == 0
    only = capsys.readouterr().out
    alone = ml.plan_memory(
        tmp_path,
        ml.LoRAConfig(r=4),
        ml.TrainConfig(per_device_train_batch_size=2, max_length=64),
        quantize="nf4",
        dtype="bfloat16",
        card="20MB",
    )
    assert "qlora fits 0.0 GB" in only and only.strip().replace("qlora fits", "fits") == str(alone)


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    command, shown = re.search(
        r"<!-- plan -->\n```\n\$ minilora plan (.*?[^\\])\n(.*?)```", text("docs/memory.md"), re.S
    ).groups()
    assert main(["plan", str(tmp_path), *command.replace("\\\n", "").split()[1:]]) == 0
    printed = capsys.readouterr().out
    assert shown == printed, f"put this into docs/memory.md:\n{printed}"


@pytest.mark.slow
@pytest.mark.strict
def test_the_picture_in_the_docs_is_what_the_command_draws(tmp_path: Path, monkeypatch):
    # no picture shows the verdict; the test above checks its text
    monkeypatch.setattr(ml.MemoryPlan, "verdict", "")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    command = re.search(
        r"`minilora plan \S+ (.*) --plot docs/plan.svg`", text("docs/LOG.md").replace("\n", " ")
    )
    assert (
        command
        and main(["plan", str(tmp_path), *command[1].split(), "--plot", str(tmp_path / "plan.svg")])
        == 0
    )
    pictures = ((folder / "plan.svg").read_text() for folder in (tmp_path, ROOT / "docs"))
    # bars and the line
    drawn, kept = (re.findall(r'<path d="([^"]*)" clip-path', picture) for picture in pictures)
    assert drawn == kept and len(drawn) > 10


# ---- memory runs out


class Short(SFT):
    """Objective whose loss always raises an out-of-memory error."""

    def __init__(self, error: Exception):
        object.__setattr__(self, "error", error)

    def loss(self, model, batch):
        raise self.error


def train(model: torch.nn.Module, error: Exception, **fields) -> str:
    """Train until `error` is raised and return its notes."""
    with pytest.raises(type(error)) as raised:
        ml.train(model, Letters(), rows(), ml.TrainConfig(**FAST | fields), objective=Short(error))
    assert raised.value is error
    return "\n".join(getattr(error, "__notes__", []))


CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU)], ids=["gpu", "cpu"]
)
def test_a_shortage_is_explained(error: RuntimeError):
    model = lora()
    note = train(model, error, max_length=64)
    planned = ml.plan_memory(model, config=ml.TrainConfig(**FAST, max_length=64))
    assert re.match(r"memory ran out: .* [\d.]+ GB; planned, with full rows:\n", note)
    assert f"{planned.total / 1e9:,.3f}" in note and f"{planned.trainable:,}" in note


def test_a_shortage_plans_no_more_than_the_smallest_change(monkeypatch):
    """The note names one change, so the planner plans no other."""
    made, changed = [], ml.MemoryPlan.changed

    def counted(self, **to):
        made.append(to)
        return changed(self, **to)

    monkeypatch.setattr(ml.MemoryPlan, "changed", counted)
    monkeypatch.setattr("minilora.tools.memory_plan.shortage.peak_memory", lambda device: 10**9)
    note = explain(lora(), ml.TrainConfig(per_device_train_batch_size=4, max_length=64), before=0)
    assert "smallest change that fits" in note and "per_device_train_batch_size=2" in note
    assert made == [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}]


def test_other_errors_get_no_note_and_unknown_models_no_plan():
    assert train(lora(), RuntimeError("shapes do not match")) == ""
    note = train(Wrapped(lora()), RuntimeError(CPU))
    assert note.startswith("memory ran out") and "No plan: " in note


@pytest.mark.slow
def test_a_real_shortage_names_a_remedy():
    """In a process that may not grow, the allocator fails in forward.

    Training with the change that the note names then succeeds.
    """
    code = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import minilora as ml
from helpers.toy import FAST, Letters, llama, lora
model = lora(llama(hidden_size=128, intermediate_size=4096, max_position_embeddings=4096))
rows = [{"text": "abcdefgh" * 128}] * 8
ml.train(model, Letters(), rows[:1], ml.TrainConfig(max_steps=1, max_length=16))
ml.plan_memory(model, config=ml.TrainConfig(max_length=16))  # imports the planner
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))
try:
    ml.train(model, Letters(), rows, ml.TrainConfig(max_steps=1, max_length=1024))
except RuntimeError as error:
    print(note := error.__notes__[0])
    fields = dict(word.split("=") for word in note.split("GB: ")[-1].split(", "))
fields = {name: int(value) for name, value in fields.items()}
config = ml.TrainConfig(**{"max_steps": 1, "max_length": 1024} | fields)
result = ml.train(model, Letters(), rows, config)
print("steps:", result.steps)
"""
    note = python(code, ROOT / "tests")
    assert re.search(
        r"smallest change that fits [\d.]+ GB: (per_device_train_batch_size|max_length)=\d", note
    ), note
    assert note.endswith("steps: 1\n")


def test_the_command_line_prints_the_note(monkeypatch, capsys):
    def plan_memory(*_, **__):
        error = RuntimeError("no memory")
        error.add_note("a remedy")
        raise error

    monkeypatch.setattr("minilora.cli.plan.plan_memory", plan_memory)
    assert main(["plan", "model", "--quantize", "nf4"]) == 1
    assert "minilora: no memory\na remedy\n" in capsys.readouterr().err


# ---- error


@pytest.mark.parametrize(
    "how, message",
    [
        ({"card": "24 apples"}, "such as 24GB"),
        ({"quantize": "int8"}, "must be None, 'nf4' or 'keep'"),
        (
            {"config": ml.TrainConfig(method="full"), "lora": ALL, "quantize": None},
            "leave out lora and quantize",
        ),
        (
            {"config": ml.TrainConfig(method="full"), "lora": None, "quantize": None},
            "keeps weights in fp32",
        ),
        ({"lora": ml.LoRAConfig(target_modules=["q_prj"])}, "q_proj"),
        ({"shape": {"model_type": "t5"}}, "unknown architecture"),
        ({"shape": "no/such/model.gguf"}, "no folder or .gguf file"),
    ],
)
def test_an_impossible_plan_raises_with_the_reason(how: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(**{"shape": TINY} | how)


def test_a_loaded_model_is_planned_as_it_is():
    with pytest.raises(ValueError, match="determines its adapter and quantisation"):
        ml.plan_memory(lora(), ALL)
    with pytest.raises(ValueError, match="has no adapter"):
        ml.plan_memory(llama())
    with pytest.raises(ValueError, match="'max_length', 'per_device_train_batch_size', 'r'"):
        plan(TINY).most("seed", 1)
