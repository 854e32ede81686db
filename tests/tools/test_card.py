"""Proves that a model card states only facts of its folder and figures and keeps foreign text."""

import math
import re

import pytest
import torch
import yaml

import minilora as ml
from helpers import toy
from helpers.tiny import save
from minilora.common import read_tensors, write_tensors
from minilora.tools.model_card import HERE, addressed, is_ours


@pytest.fixture
def folder(tmp_path):
    """Save an adapter of the 4-bit toy model, whose name is that of a Hub repository."""
    model = toy.llama()
    ml.quantize_model(model, blocksize=32)
    model.name_or_path = "tiny/llama"
    toy.lora(model, targets=["q_proj", "down_proj"])
    ml.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def read(folder) -> tuple[dict, dict[str, str], str]:
    """Return the front matter, the rows of all tables and the whole text."""
    text = (folder / "README.md").read_text()
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.S)
    assert front
    return (
        yaml.safe_load(front[1]),
        dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, flags=re.M)),
        text,
    )


def result(**fields):
    nothing = dict.fromkeys(
        ("tokens_per_second", "seconds", "peak_memory_bytes", "checkpoint", "best_step", "log")
    )
    known = {
        "steps": 30,
        "loss": 1.5,
        "eval_loss": None,
        "tokens": 12345,
        "interrupted": False,
        "losses": [],
    }
    return ml.TrainResult(**nothing | known | {"evals": [], "metrics": {}} | fields)


# ---- oracle


def test_an_adapters_card_states_its_files_and_figures(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    scores = ml.Scores(
        n=4, tokens=9, loss=0.5, perplexity=math.exp(0.5), answers=4, exact_match=0.75
    )
    given = {"dataset": tmp_path / "rows.jsonl", "license": "apache-2.0"}
    assert (
        ml.write_model_card(
            folder, result(), scores, {"JSON | valid": 1.0, "wrong": 0, "passed": False}, **given
        )
        == folder / "README.md"
    )
    front, rows, text = read(folder)
    assert front == {
        "library_name": "peft",
        "base_model": "tiny/llama",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "minilora"],
    }
    sizes = [math.prod(shape) for _, shape in ml.inspect(folder).tensors.values()]
    assert rows == {
        "r": "4",
        "lora_alpha": "8",
        "target_modules": "down_proj, q_proj",
        "numbers that were trained": f"{sum(sizes):,}",
        "the base's weights": "4 bits, NF4 in blocks of 32",
        "minilora": ml.__version__,
        "file": "rows.jsonl",
        "rows": "2",
        "training steps": "30",
        "training tokens": "12,345",
        "training loss": "1.5",
        "held-out rows": "4",
        "held-out tokens": "9",
        "held-out loss": "0.5",
        "held-out perplexity": "1.649",
        "held-out answers": "4",
        "held-out exact match": "0.75",
        r"JSON \| valid": "1",
        "wrong": "0",
        "passed": "False",
    }
    assert str(tmp_path) not in text
    assert 'ml.load_model("tiny/llama", quantize="nf4", blocksize=32)' in text
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        compile(code, "card", "exec")


@pytest.mark.slow  # imports transformers and peft
def test_the_code_for_peft_loads_a_gguf_base(tmp_path, monkeypatch):
    """Run the code of the card, without its tokenizer, which the toy file does not have."""
    dense = toy.llama()
    ml.save_model(dense, tmp_path / "m.gguf", format="gguf")
    model = ml.load_model(tmp_path / "m.gguf", dtype="float32")
    toy.lora(model, targets=["q_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    ml.save_adapter(model, tmp_path / "adapter")
    ml.write_model_card(tmp_path / "adapter")
    text = read(tmp_path / "adapter")[2]
    theirs = next(c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "PeftModel" in c)
    lines = [line for line in theirs.splitlines() if not line.startswith("tokenizer")]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(lines).replace(HERE, "adapter"), names)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids)
        found = names["model"](ids).logits
    assert not torch.allclose(expected, dense(ids), rtol=1e-3)  # the adapter has an effect
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_base_weight_in_an_adapter_file_does_not_count_as_trained(folder):
    """PEFT writes one for an adapted embedding or output layer."""
    tensors = read_tensors(folder / "adapter_model.safetensors")
    base = {"base_model.model.lm_head.base_layer.weight": torch.zeros(97, 64)}
    write_tensors(folder / "adapter_model.safetensors", tensors | base)
    trained = sum(tensor.numel() for tensor in tensors.values())
    assert (
        read(ml.write_model_card(folder).parent)[1]["numbers that were trained"] == f"{trained:,}"
    )


def test_a_models_card(tmp_path):
    save(tmp_path)
    ml.write_model_card(tmp_path, base_model="tiny/llama")
    front, rows, _ = read(tmp_path)
    assert front == {
        **{
            "library_name": "transformers",
            "base_model": "tiny/llama",
            "pipeline_tag": "text-generation",
        },
        "tags": ["minilora"],
    }
    assert rows["architectures"] == "LlamaForCausalLM" and rows["values"].startswith("F32 ")
    ml.write_model_card(tmp_path, result(), base_model="tiny/llama", dataset="owner/rows")
    front, rows, _ = read(tmp_path)
    assert front["base_model_relation"] == "finetune" and front["datasets"] == ["owner/rows"]
    ml.write_model_card(tmp_path, result())
    assert not {"base_model", "base_model_relation", "datasets"} & read(tmp_path)[0].keys()


def test_a_gguf_files_card(tmp_path):
    ml.save_model(toy.llama(), tmp_path / "m.gguf", format="gguf")
    ml.write_model_card(tmp_path)
    front, rows, text = read(tmp_path)
    assert front == {"pipeline_tag": "text-generation", "tags": ["minilora"]}
    assert rows["general.architecture"] == "llama" and 'ml.load_model("m.gguf")' in text


# ---- property


def test_unknown_facts_are_left_out(folder):
    """Without a Hub base, data or figures, the card has no fields and sections for them.

    It contains no path of this machine.
    """
    config = folder / "adapter_config.json"
    config.write_text(
        config.read_text()
        .replace('"tiny/llama"', '"/models/secret/base"')
        .replace("CAUSAL_LM", "SEQ_CLS")
    )
    ml.write_model_card(folder)
    front, _, text = read(folder)
    assert front == {"library_name": "peft", "tags": ["lora", "minilora"]}
    assert re.findall("^#+ (.*)", text, flags=re.M) == [
        "A LoRA adapter for `base`, a local model",
        "What it is",
        "Use",
    ]
    assert "secret" not in text and "None" not in text


def test_the_card_follows_the_files(folder):
    ml.write_model_card(folder, result())
    first = (folder / "README.md").read_text()
    ml.write_model_card(folder, result())
    assert (folder / "README.md").read_text() == first
    ml.write_model_card(folder, result(interrupted=True))
    assert read(folder)[1]["training interrupted"] == "True"


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "# Mine\n",
        lambda text: text.replace("adapter", "Adapter"),
        lambda text: text + "x",
    ],
)
def test_a_card_changed_by_its_owner_is_kept(folder, edit):
    ml.write_model_card(folder)
    card = folder / "README.md"
    assert is_ours(card.read_text())
    theirs = edit(card.read_text())
    card.write_text(theirs)
    with pytest.warns(UserWarning, match="README.md is kept"):
        ml.write_model_card(folder, result())
    assert card.read_text() == theirs == addressed(theirs, "me/it")


def test_addressed_puts_the_repository_into_the_card(folder):
    ml.write_model_card(folder)
    text = (folder / "README.md").read_text()
    there = addressed(text, "me/it")
    assert HERE in text and HERE not in there and is_ours(there)
    assert there.count('"me/it"') == text.count(f'"{HERE}"') == 2


# ---- error


def test_card_errors(folder, tmp_path):
    with pytest.raises(ValueError, match=r"figures: \['evaluation loss', .* are given twice"):
        ml.write_model_card(folder, result(), result())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a folder with .safetensors"):
        ml.write_model_card(tmp_path / "empty")
    with pytest.raises(OSError, match="absent.jsonl"):
        ml.write_model_card(folder, dataset="absent.jsonl")
    assert not (folder / "README.md").exists()
