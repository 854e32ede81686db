"""Proves that the self-test passes on correct training and that each check finds its own fault.

Oracle: models broken on purpose. The check `moved` has no broken model, since a B without a
gradient stops training at step 1; its test breaks the optimiser.
"""

import pytest
import torch

from helpers.toy import Letters, llama, lora, rows
from minilora import check_training
from minilora.quant.quantize_model import quantize_model
from minilora.training import session


def failed(model, **options):
    return {
        check.name
        for check in check_training(model, Letters(), **options).checks
        if not check.passed
    }


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_a_correct_model_passes_and_is_unchanged(kind):
    model = llama() if kind != "bf16" else llama().bfloat16()
    if kind == "nf4":
        quantize_model(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    report = check_training(model, Letters())
    assert report.passed, report
    assert "FAILED" not in str(report) and len(report.checks) == str(report).count("ok ")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(value, after[name]) for name, value in before.items()
    )
    assert wanted == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_hidden_state_that_depends_on_the_batch_is_found():
    model = llama()
    model.model.norm.register_forward_hook(
        lambda module, inputs, out: out + 0.1 * out.mean(0, keepdim=True)
    )
    assert failed(model) == {"split", "eval"}


def test_packed_documents_that_see_each_other_are_found(monkeypatch):
    model = llama()
    real = model.hidden

    def forgetful(input_ids, position_ids=None, document_ids=None, cache=None):
        return real(input_ids, position_ids, None, cache)

    monkeypatch.setattr(model, "hidden", forgetful)
    assert failed(model) == {"packed"}


def test_a_base_that_forward_changes_is_found():
    model = llama()

    def drift(module, inputs):
        module.weight.data.mul_(1.001)

    model.model.norm.register_forward_pre_hook(drift)
    assert {"off", "frozen"} <= failed(model)


def test_a_wrong_merge_is_found(monkeypatch):
    from minilora.tools import check_training as module

    monkeypatch.setattr(module, "merge", lambda model: llama(seed=1))
    assert failed(llama()) == {"merged"}


def test_a_matrix_that_did_not_move_is_found(monkeypatch):
    real = session.new_optimizer

    def forgetful(model, parameters, config):
        return real(
            model, {name: p for name, p in parameters.items() if "layers.1." not in name}, config
        )

    monkeypatch.setattr(session, "new_optimizer", forgetful)
    report = check_training(llama(), Letters())
    (check,) = (check for check in report.checks if not check.passed)
    assert (
        check.name == "moved"
        and check.measured == 7
        and "model.layers.1.self_attn.q_proj" in check.meaning
    )


def test_the_users_rows_are_used():
    assert failed(llama(), rows=rows(5)) == set()
    with pytest.raises(ValueError, match="none of 1 rows|no known shape"):
        check_training(llama(), Letters(), rows=[{"words": 1}])


def test_adapters_are_refused():
    with pytest.raises(ValueError, match="expected a model without adapters"):
        check_training(lora(), Letters())
