"""Tests of a merged model that optimum exports to ONNX.

Oracle: onnxruntime computes the logits that minilora computed before the model was written. optimum
needs an older transformers, so it runs in an environment of its own.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch

import minilora as ml
from helpers.environment import environment
from helpers.tiny import oracle, tokens, twin

REQUIREMENTS = [
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    "onnx==1.23.2",
    "onnxruntime==1.32.0",
    "ml_dtypes==0.6.0",
    "flatbuffers==25.12.19",
    "transformers==4.57.6",
    "huggingface_hub==0.36.2",
    "tokenizers==0.22.2",
]
# The arguments are the folder of the model and a folder for the ONNX file.
EXPORT = """
import sys

import numpy as np
import onnxruntime
from optimum.exporters.onnx import main_export

model, out = sys.argv[1:]
main_export(model, out, task="text-generation", do_validation=False)
session = onnxruntime.InferenceSession(f"{out}/model.onnx", providers=["CPUExecutionProvider"])
ids = np.load(f"{model}/ids.npy")
feeds = {
    "input_ids": ids,
    "attention_mask": np.ones_like(ids),
    "position_ids": np.arange(ids.shape[1])[None].repeat(len(ids), axis=0),
}
names = [given.name for given in session.get_inputs()]
logits = session.run(["logits"], {name: feeds[name] for name in names})[0]
np.save(f"{out}/logits.npy", logits)
"""


@pytest.mark.slow
def test_onnxruntime_computes_the_logits_of_a_merged_model(tmp_path):
    variables = environment(tmp_path / "packages", REQUIREMENTS)
    model = twin(oracle())
    ml.inject(model, ml.LoRAConfig(r=4, target_modules="all-linear"))
    ids = tokens(2, 9)
    with torch.no_grad():
        untrained = model(ids)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        expected = model(ids)
    assert (expected - untrained).abs().max() > 0.1  # so that an export of the base alone fails
    folder = tmp_path / "dense"
    ml.save_model(model, folder, merge=True)
    np.save(folder / "ids.npy", ids.numpy())

    out = tmp_path / "onnx"
    run = [sys.executable, "-c", EXPORT, str(folder), str(out)]
    done = subprocess.run(run, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = torch.from_numpy(np.load(out / "logits.npy"))
    # Both compute in fp32, in another order: logits up to 8.2, eps 1.2e-7, sums of 96 terms.
    assert (logits - expected).abs().max() < 1e-4
