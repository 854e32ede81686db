"""Tests of DPO against TRL.

Each loss equals TRL's on the same batch, and training is as exact as with the other objectives.
Oracle: the loss code of TRL's DPOTrainer, run on our batch, with the same model and the same
adapter in PEFT. The reference of both is the model without its adapter.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch

import minilora as ml
from helpers.objective_laws import check_eval_batches, check_resume, check_splits, stirred
from helpers.tiny import oracle, twin
from helpers.toy import FAST, Letters, adapters, llama, lora
from minilora.lora.files.save_load import save_adapter
from minilora.losses.dpo import answer_logprobs
from minilora.losses.sft import means
from minilora.training.config import TrainConfig
from minilora.training.loop import train

WORDS = ["abc", "defabc", "fe", "bbbbbb", "caf", "deed", "a", "feedback"]
ROWS = [{"prompt": f"{word}=", "chosen": word, "rejected": word[::-1] + "ee"} for word in WORDS]
KINDS = [
    {},
    {"beta": 0.5},
    {"loss_type": "ipo"},
    {"loss_type": "ipo", "beta": 0.3},
    {"label_smoothing": 0.2},
]


def batch_of(objective: ml.DPO, rows=ROWS) -> dict[str, torch.Tensor]:
    return objective.collate(objective.encode(rows, Letters(), 64))


# ---- oracle


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return our model and PEFT's, with the same weights and an adapter that has an effect."""
    from peft import PeftModel

    theirs = oracle(vocab_size=len(Letters()), max_position_embeddings=64)
    ours = stirred(lora(twin(theirs)))
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(ours, folder)
    return ours, PeftModel.from_pretrained(theirs, folder, is_trainable=True)


def trl_loss(model: Any, batch: dict[str, torch.Tensor], folder, **fields: Any):
    """Return TRL's (loss, metrics) on our batch; its trainer is built with rows that it ignores."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    tokenizer = word_tokenizer(PreTrainedTokenizerFast)
    config = DPOConfig(str(folder), report_to="none", use_cpu=True, bf16=False, **fields)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    # "ref" is a copy of the initial adapter; without it TRL's reference is the base, as here.
    model.delete_adapter("ref")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    inputs["completion_mask"] = (batch["labels"] != -100).long()
    loss = trainer.compute_loss(model, inputs)
    return loss, {key: values[-1] for key, values in trainer._metrics["train"].items()}


def word_tokenizer(cls: Any) -> Any:
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3}, unk_token="a"))
    return cls(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("fields", KINDS[:4], ids=str)
def test_loss_gradient_and_metrics_are_trls(both, fields, tmp_path):
    ours, theirs = both
    objective = ml.DPO(**fields)
    batch = batch_of(objective)
    expected, metrics = trl_loss(theirs, batch, tmp_path, **fields)
    expected.backward()
    ours.zero_grad()
    loss, sums = objective.loss(ours, batch)
    (loss / len(ROWS)).backward()
    assert loss.item() / len(ROWS) == pytest.approx(expected.item(), rel=1e-5)
    names = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    names |= {"chosen_logprob": "logps/chosen", "rejected_logprob": "logps/rejected"}
    assert {name: value.item() / len(ROWS) for name, value in sums.items()} == pytest.approx(
        {name: metrics[their] for name, their in names.items()}, rel=1e-5
    )
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            path = name.removeprefix("base_model.model.").replace(".default.weight", "")
            layer, _, factor = path.rpartition(".")
            mine = ours.get_submodule(layer).adapters["default"].get_parameter(factor).grad
            # fp32, sums in another order
            assert (mine - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()
            parameter.grad, compared = None, compared + 1
    assert compared == 2 * 7 * 3


def test_smoothing_is_that_of_trls_aot_loss(both, tmp_path):
    """On a single pair, where there is nothing to sort, TRL's AOT loss is conservative DPO."""
    ours, theirs = both
    objective = ml.DPO(label_smoothing=0.2, beta=0.3)
    for row in ROWS[:3]:
        batch = batch_of(objective, [row])
        expected, _ = trl_loss(
            theirs, batch, tmp_path, loss_type="aot", label_smoothing=0.2, beta=0.3
        )
        assert objective.loss(ours, batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)


# ---- properties


@pytest.mark.parametrize("fields", KINDS[::2], ids=str)
def test_gradient_and_evaluation_do_not_depend_on_the_split(fields):
    check_splits(stirred(lora()), ml.DPO(**fields), ROWS)
    check_eval_batches(stirred(lora()), ml.DPO(**fields), ROWS)


def test_a_resumed_run_is_one_that_never_stopped(tmp_path):
    check_resume(lambda: lora(dropout=0.1), ml.DPO(), ROWS, tmp_path)


def test_before_training_the_margin_is_zero_and_after_it_is_not():
    model = lora(dropout=0.2)
    result = train(
        model,
        Letters(),
        ROWS,
        TrainConfig(**FAST | {"max_steps": 20}),
        objective=ml.DPO(),
        eval_dataset=ROWS,
    )
    assert result.metrics["accuracy"][-1] >= 0.75 and result.loss < result.losses[0]
    assert result.evals[-1]["eval_accuracy"] == 1 and result.evals[-1]["eval_margin"] > 0.1
    tokens = torch.arange(9)[None]
    with ml.disable_adapters(model):
        assert torch.equal(model(tokens), llama()(tokens))
    fresh = lora()
    found, pairs = means(fresh, ml.DPO().encode(ROWS, Letters(), 64), 4, ml.DPO())
    assert found["margin"] == 0 and found["loss"] == pytest.approx(0.6931472) and pairs == len(ROWS)


def test_the_reference_is_the_base_without_gradient_or_dropout():
    model = stirred(lora(dropout=0.5)).train()
    objective = ml.DPO()
    batch = batch_of(objective)
    with ml.disable_adapters(model), torch.no_grad():
        reference, _ = answer_logprobs(model.eval(), batch)
    answers, _ = answer_logprobs(model, batch)
    ratios = (answers - reference).chunk(2)
    expected = 0.1 * (ratios[0] - ratios[1]).sum()
    assert objective.loss(model, batch)[1]["margin"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    assert adapters(model).keys() == adapters(lora()).keys()  # the same parameters train
    modes = []
    model.train().model.norm.register_forward_hook(
        lambda norm, *_: modes.append((norm.training, torch.is_grad_enabled()))
    )
    objective.loss(model, batch)
    assert modes == [(False, False), (True, True)]


def test_prompts_are_masked_as_in_supervised_training():
    objective, letters = ml.DPO(), Letters()
    texts = objective.encode(ROWS, letters, None)
    for row, pair in zip(ROWS, texts, strict=True):
        for side in ("chosen", "rejected"):
            example = getattr(pair, side)
            whole = ml.SFT().encode(
                [{"prompt": row["prompt"], "completion": row[side]}], letters, None
            )[0]
            assert (example.input_ids, example.labels) == (whole.input_ids, whole.labels)
    chat = [{"role": "user", "content": "hi"}]
    with_prompt = {"prompt": chat, "chosen": [{"role": "assistant", "content": "yes"}],
                   "rejected": [{"role": "assistant", "content": "no"}]}  # fmt: skip
    whole = {side: chat + with_prompt[side] for side in ("chosen", "rejected")}
    from helpers.chats import ours

    first, second = (
        objective.encode([row], ours("chatml"), None)[0] for row in (with_prompt, whole)
    )
    assert (first.chosen.input_ids, first.chosen.labels) == (
        second.chosen.input_ids,
        second.chosen.labels,
    )
    assert (first.rejected.input_ids, first.rejected.labels) == (
        second.rejected.input_ids,
        second.rejected.labels,
    )


HI = {"role": "user", "content": "hi"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
SYSTEM = {"role": "system", "content": "be short"}
PLAIN = {"prompt": [HI], "chosen": [YES], "rejected": [NO]}
WITH_SYSTEM = PLAIN | {"prompt": [SYSTEM, HI]}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}  # fmt: skip
FORMS = {
    "prompt repeated": (PLAIN | {"chosen": [HI, YES], "rejected": [HI, NO]}, PLAIN),
    "system and prompt repeated": (
        WITH_SYSTEM | {"chosen": [SYSTEM, HI, YES], "rejected": [SYSTEM, HI, NO]},
        WITH_SYSTEM,
    ),
    "last turn repeated": (WITH_SYSTEM | {"chosen": [HI, YES], "rejected": [HI, NO]}, WITH_SYSTEM),
    "ultrafeedback": (
        {"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, NO], "messages": [HI, YES]},
        PLAIN,
    ),
    "ultrafeedback with a system message": (
        {"prompt": "hi", "chosen": [SYSTEM, HI, YES], "rejected": [SYSTEM, HI, NO]},
        WITH_SYSTEM,
    ),
    "text prompt, answers alone": ({"prompt": "hi", "chosen": [YES], "rejected": [NO]}, PLAIN),
    "messages, texts": ({"prompt": [HI], "chosen": "yes", "rejected": "no"}, PLAIN),
    "LLaMA-Factory, ShareGPT": (SHAREGPT, PLAIN),
    "LLaMA-Factory, system": (SHAREGPT | {"system": "be short"}, WITH_SYSTEM),
    "LLaMA-Factory, OpenAI": ({"messages": [HI], "chosen": YES, "rejected": NO}, PLAIN),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no"},
        PLAIN,
    ),
    "JSON texts": ({key: json.dumps(value) for key, value in WITH_SYSTEM.items()}, WITH_SYSTEM),
    "JSON texts of conversations": (
        {"chosen": json.dumps([SYSTEM, HI, YES]), "rejected": json.dumps([SYSTEM, HI, NO])},
        WITH_SYSTEM,
    ),
    "JSON texts after a text prompt": (
        {"prompt": "hi", "chosen": json.dumps([HI, YES]), "rejected": json.dumps([HI, NO])},
        PLAIN,
    ),
    "arrays of a DataFrame": (
        {key: np.array(value, dtype=object) for key, value in PLAIN.items()},
        PLAIN,
    ),
    "nulls of Arrow": (PLAIN | {"conversations": None, "instruction": None}, PLAIN),
    "text repeated": (
        {"prompt": "2 + 2 =", "chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"},
        {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    ),
    "one answer is JSON": (
        {"prompt": "write JSON", "chosen": json.dumps([YES]), "rejected": "no"},
        None,
    ),
    "text repeated by one answer": (
        {"prompt": "say ab", "chosen": "say ab", "rejected": "no"},
        None,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair_trains_the_same_tokens(form):
    from helpers.chats import ours

    row, plain = FORMS[form]
    (found,) = ml.DPO().encode([row], ours("chatml"), None)
    (expected,) = ml.DPO().encode([plain or row], ours("chatml"), None)
    assert found == expected
    answers = [
        ours("chatml").decode([label for label in example.labels if label != -100])
        for example in (found.chosen, found.rejected)
    ]
    if isinstance((plain or row)["chosen"], list):
        assert answers == ["yes<|im_end|>", "no<|im_end|>"]
    if plain is None:
        assert answers[0].startswith(row["chosen"])


def test_the_report_names_equal_pairs_repeated_prompts_and_unused_keys():
    rows = [
        *ROWS[:2],
        {"prompt": "a=", "chosen": "b", "rejected": "b"},
        {"prompt": "a=", "chosen": "a=b", "rejected": "a=c", "messages": [HI, YES]},
    ]
    report = ml.DPO().encode(rows, Letters(), None).report
    assert "4 pairs of 4 rows" in report
    assert "1 pairs have equal answers and teach nothing (rows 2)" in report
    assert "1 rows repeat the prompt in both answers: it was taken off there (rows 3)" in report
    assert "keys not used: messages" in report
    assert "equal" not in ml.DPO().encode(ROWS, Letters(), None).report


def test_a_run_may_begin_with_an_equal_pair():
    rows = [{"prompt": "a=", "chosen": "b", "rejected": "b"}] + ROWS[:1]
    config = TrainConfig(**FAST | {"per_device_train_batch_size": 1, "group_by_length": False})
    model = lora()
    result = train(model, Letters(), rows, config, objective=ml.DPO())
    assert result.steps == 5 and min(result.losses) < 0.69


def test_a_pair_that_lost_an_answer_is_left_out_and_reported():
    long = {"prompt": "abc=", "chosen": "a", "rejected": "b"}
    data = ml.DPO().encode([*ROWS[:1], long | {"prompt": "a" * 30}], Letters(), 16)
    assert (
        len(data) == 1
        and "1 pairs of 2 rows" in data.report
        and "left out: no trained token" in data.report
    )


# ---- errors


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], "row 0: expected prompt, chosen and rejected"),
        ([{"chosen": "a", "rejected": "b"}], "need a prompt"),
        (
            [
                {
                    "chosen": [{"role": "user", "content": "a"}],
                    "rejected": [{"role": "user", "content": "b"}],
                }
            ],
            "same messages",
        ),
        ([{"prompt": "a", "completion": "b", "label": True}], "KTO's rows.*are no pairs"),
        ([PLAIN | {"chosen": [HI, YES]}], "one answer repeats the prompt and the other does not"),
        ([PLAIN | {"chosen": "yes"}], "must both be texts or both be messages, got str and list"),
        (
            [PLAIN | {"chosen": [HI], "rejected": [HI]}],
            "chosen must begin with an assistant message",
        ),
        (
            [{"prompt": "other", "chosen": [HI, YES], "rejected": [HI, NO]}],
            "prompt 'other' is not the last message that chosen and rejected share, 'hi'",
        ),
        ([PLAIN | {"chosen": [{"role": "robot", "content": "a"}]}], r"row 0, chosen\[0\]: unknown"),
        ([PLAIN | {"chosen": 3}], "chosen must be a text or a list of messages, got 3"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "b"}],
            "both answers are equal in all 1 pairs",
        ),
    ],
)
def test_rows_without_preferences_raise(rows, message):
    with pytest.raises(ValueError, match=message):
        ml.DPO().encode(rows, Letters(), None)


def test_a_model_without_an_adapter_raises():
    with pytest.raises(ValueError, match=r"without its adapter, and this model has no adapter"):
        train(llama(), Letters(), ROWS, TrainConfig(method="full"), objective=ml.DPO())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0}, "beta: expected > 0"),
        ({"loss_type": "hinge"}, "loss_type: expected one of sigmoid, ipo"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "does nothing"),
    ],
)
def test_fields_out_of_range_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        ml.DPO(**fields)
