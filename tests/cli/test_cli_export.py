"""Tests of `minilora export`: each form, read back, is the merged model.

Oracle: ml.merge of the same base and adapter, rounded to the dtype of the form.
"""

import pytest
import torch

import minilora as ml
from helpers.chats import furnish
from minilora.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model, its tokenizer, and an adapter that changes it."""
    folder = furnish(tmp_path_factory.mktemp("place"))
    save_random_adapter(ml.load_model(folder / "model", dtype="float32"), folder / "adapter")
    return folder


def save_random_adapter(model, folder):
    ml.inject(model, ml.LoRAConfig(r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    for layer in model.modules():
        if isinstance(layer, ml.LoRALayer):
            torch.nn.init.normal_(layer.get_parameter("adapters.default.lora_B"), std=0.05)
    ml.save_adapter(model, folder)


def merged(place, quantize=None, storage=None):
    model = ml.load_model(place / "model", dtype="float32", quantize=quantize)
    ml.load_adapter(model, place / "adapter", check_base=False)
    return ml.merge(model, storage)


def logits(model) -> torch.Tensor:
    tokens = torch.arange(24)[None]  # (1, T)
    with torch.inference_mode():
        return model(tokens).float()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", []),
        ("dense16", ["--dtype", "bf16"]),
        ("plain.gguf", ["--dtype", "f32"]),
        ("half.gguf", ["--dtype", "f16"]),
    ],
)
def test_an_exported_model_is_the_merged_one_rounded_once(place, capsys, name, options):
    out = place / name
    run = ["export", str(place / "model"), str(out), "--adapter", str(place / "adapter")]
    assert main([*run, *options]) == 0
    assert f"wrote {out}: " in capsys.readouterr().out
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(options[-1] if options else "")
    expected = merged(place).state_dict()
    found = ml.load_model(out, dtype="float32")
    for key, value in found.state_dict().items():
        rounds = dtype is not None and (value.dim() > 1 or out.is_dir())  # GGUF's vectors are fp32
        exact = expected[key].to(dtype).float() if rounds else expected[key]
        assert torch.equal(value, exact), key
    if dtype is None:
        assert torch.equal(logits(found), logits(merged(place)))
    assert ml.load_tokenizer(out).encode("1 plus 1") == ml.load_tokenizer(place / "model").encode(
        "1 plus 1"
    )


def test_q8_0_differs_by_half_a_step_of_its_scale(place):
    out = place / "q8.gguf"
    run = ["export", str(place / "model"), str(out), "--adapter", str(place / "adapter")]
    assert main([*run, "--dtype", "q8_0"]) == 0
    found, expected = ml.load_model(out, dtype="float32").state_dict(), merged(place).state_dict()
    differs = False
    for key, value in found.items():
        # Half a step is absmax / 127 / 2; the scale itself is rounded to fp16 (2^-11).
        bound = expected[key].abs().max() / 127 * (0.5 + 127 * 2**-11)
        assert (value - expected[key]).abs().max() <= bound, key
        differs |= not torch.equal(value, expected[key])
    assert differs


@pytest.mark.parametrize("adapter", [True, False])
def test_bnb_4bit_is_the_model_in_nf4(place, capsys, adapter):
    out = place / f"four-{adapter}"
    run = ["export", str(place / "model"), str(out), "--format", "bnb-4bit"]
    with pytest.warns(UserWarning) if adapter else pytest.MonkeyPatch.context():
        given = ["--adapter", str(place / "adapter")] if adapter else []
        assert main([*run, *given]) == 0
        if adapter:
            expected = merged(place, "nf4", "nf4")
        else:
            expected = ml.load_model(place / "model", dtype="float32", quantize="nf4")
    assert ("(stochastic), which adds noise to the adapter" in capsys.readouterr().out) == adapter
    found = ml.load_model(out, dtype="float32").state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("given", "options"),
    [(["--seed", "7"], {"seed": 7}), (["--rounding", "nearest"], {"rounding": "nearest"})],
)
@pytest.mark.filterwarnings("ignore:.*was trained on a base that was")
def test_bnb_4bit_is_rounded_as_asked(place, tmp_path, given, options):
    out = tmp_path / "four"
    run = ["export", str(place / "model"), str(out), "--adapter", str(place / "adapter")]
    assert main([*run, "--format", "bnb-4bit", *given]) == 0
    model = ml.load_model(place / "model", dtype="float32", quantize="nf4")
    ml.load_adapter(model, place / "adapter", check_base=False)
    expected = ml.merge(model, "nf4", **options).state_dict()
    found = ml.load_model(out, dtype="float32").state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("options", [[], ["--format", "bnb-4bit"]])
@pytest.mark.filterwarnings("ignore:.*was trained on a base that was dense")
def test_the_folder_of_an_adapter_is_exported_like_its_base_and_adapter(place, tmp_path, options):
    base = tmp_path / "base"
    model = ml.load_model(place / "model", dtype="bfloat16")
    ml.save_model(model, base, tokenizer=ml.load_tokenizer(place / "model"))
    save_random_adapter(ml.load_model(base, dtype="bfloat16"), tmp_path / "adapter")
    both = ["export", str(base), str(tmp_path / "both"), "--adapter", str(tmp_path / "adapter")]
    assert main([*both, *options]) == 0
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "one"), *options]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("both", "one")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "{place}/model"], "exists. Choose another name"),
        (["m", "{place}/a.gguf", "--format", "dense"], "dense needs the name of a folder"),
        (["m", "{place}/a", "--format", "gguf"], "needs a file name that ends in .gguf"),
        (["m", "{place}/a", "--dtype", "q8_0"], "q8_0 is a type of GGUF files"),
        (["m", "{place}/model/config.json/a"], "is not writable"),
        (["m", "{place}/a", "--format", "bnb-4bit", "--quantize", "none"], "stores NF4, and"),
        (["{place}/model", "{place}/a", "--seed", "1"], "are for --format bnb-4bit with an"),
        (
            ["{place}/adapter", "{place}/a", "--format", "bnb-4bit", "--seed", "1"]
            + ["--rounding", "nearest"],
            "--seed is for stochastic rounding",
        ),
    ],
)
def test_the_target_is_checked_before_the_model_is_loaded(place, capsys, arguments, message):
    assert main(["export", *(argument.format(place=place) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_merge_makes_no_folder_with_the_name_of_a_gguf_file(place, capsys):
    adapter = str(place / "adapter")
    assert main(["merge", str(place / "model"), adapter, str(place / "m.gguf")]) == 1
    said = capsys.readouterr().err
    assert f"minilora export {place / 'model'} {place / 'm.gguf'} --adapter {adapter}" in said
    assert not (place / "m.gguf").exists()
    assert main(["merge", adapter, str(place / "m.gguf")]) == 1
    assert f"minilora export {adapter} {place / 'm.gguf'}\n" in capsys.readouterr().err


def test_without_the_gguf_package_export_names_it(place, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert main(["export", "nowhere", str(place / "x.gguf")]) == 1
    assert "pip install -e '.[gguf]'" in capsys.readouterr().err
