"""Tests of the classification objective.

The adapter of a classifier is a PEFT file of task SEQ_CLS, in both directions, and gives the logits
of transformers' classifier. Training is as exact as with the other objectives.
"""

import json

import pytest
import torch

import minilora as ml
from helpers.objective_laws import check_eval_batches, check_resume, check_splits, stirred
from helpers.tiny import oracle, twin
from helpers.toy import FAST, Letters, llama, lora
from minilora.lora.files.base_check import read_binding
from minilora.training.config import TrainConfig
from minilora.training.loop import train

LABELS = ["vowel", "consonant", "digit"]
TEXTS = ["abca", "xyz", "12", "eieio", "bcd", "9", "aa", "3141"]
ROWS = [
    {"text": t, "label": LABELS[0 if t[0] in "aeiou" else 2 if t.isdigit() else 1]} for t in TEXTS
]
CONFIG = ml.LoRAConfig(
    r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
)


def classifier(model=None, **fields):
    """Return a model with a head and an adapter."""
    model = llama() if model is None else model
    ml.Classify(LABELS).add_head(model)
    ml.inject(
        model,
        ml.LoRAConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | fields),
    )
    return model


def batch_of(rows=ROWS):
    objective = ml.Classify(LABELS)
    return objective.collate(objective.encode(rows, Letters(), 64))


# ---- oracle


@pytest.fixture(scope="module")
def causal():
    return oracle(vocab_size=len(Letters()), max_position_embeddings=64)


def theirs_from(causal):
    """Return transformers' classifier with the weights of a causal model and a random head."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    fields = causal.config.to_dict() | {"num_labels": len(LABELS), "pad_token_id": 0}
    model = LlamaForSequenceClassification(LlamaConfig(**fields)).eval()
    model.model.load_state_dict(causal.model.state_dict())
    return model


def test_peft_loads_a_trained_classifier(causal, tmp_path):
    from peft import PeftModel

    ours = classifier(twin(causal), modules_to_save=["score"])
    train(ours, Letters(), ROWS, TrainConfig(**FAST), objective=ml.Classify(LABELS))
    ml.save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    theirs = PeftModel.from_pretrained(theirs_from(causal), tmp_path)
    assert type(theirs).__name__ == "PeftModelForSequenceClassification"
    batch = batch_of()
    with torch.no_grad():
        expected = theirs(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        found = ml.Classify(LABELS).logits(ours.eval(), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # fp32, sums in another order
    assert found.std() > 0.1


def test_pefts_classifier_loads_and_trains_on_both_models(causal, tmp_path):
    """PEFT's file names both kinds of head, `classifier` and `score`, and holds the model's."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        theirs_from(causal), LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]) == {
        "classifier",
        "score",
    }
    objective, batch = ml.Classify(LABELS), batch_of()
    ours, same = twin(causal), theirs_from(causal)
    objective.add_head(ours)
    with torch.no_grad():
        expected = theirs.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        for model in (ours, same):
            ml.load_adapter(model, tmp_path)
            torch.testing.assert_close(
                objective.logits(model.eval(), batch), expected, rtol=1e-4, atol=1e-4
            )
    result = [
        train(model, Letters(), ROWS, TrainConfig(**FAST), objective=objective)
        for model in (ours, same)
    ]
    assert result[0].losses == pytest.approx(result[1].losses, rel=1e-4)


# ---- properties


def test_gradient_and_evaluation_do_not_depend_on_the_split():
    check_splits(stirred(classifier()), ml.Classify(LABELS), ROWS)
    check_eval_batches(stirred(classifier()), ml.Classify(LABELS), ROWS)


def test_a_resumed_run_is_one_that_never_stopped(tmp_path):
    check_resume(lambda: classifier(lora_dropout=0.1), ml.Classify(LABELS), ROWS, tmp_path)


def test_training_reaches_full_accuracy_and_predict_returns_the_labels():
    model, objective = classifier(), ml.Classify(LABELS)
    config = TrainConfig(**FAST | {"max_steps": 40})
    result = train(model, Letters(), ROWS, config, objective=objective, eval_dataset=ROWS)
    assert result.metrics["accuracy"][-1] == result.evals[-1]["eval_accuracy"] == 1
    for size in (1, 3, 100):
        assert objective.predict(model, Letters(), TEXTS, size) == [row["label"] for row in ROWS]


def test_task_type_seq_cls_trains_the_head_as_in_peft():
    """With task_type SEQ_CLS alone, the head has no adapter, and a copy of it trains."""
    named = {name for name, p in classifier().named_parameters() if p.requires_grad}
    assert named == {
        name
        for name, p in classifier(modules_to_save=["score"]).named_parameters()
        if p.requires_grad
    }
    assert "score.weight" in named
    carried = lora(llama())  # without a head, task_type changes nothing
    plain = llama()
    ml.inject(
        plain, ml.LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    )
    assert [n for n, p in plain.named_parameters() if p.requires_grad] == [
        n for n, p in carried.named_parameters() if p.requires_grad
    ]


def test_a_16_bit_model_scores_in_fp32_masters():
    model = classifier(llama().bfloat16())
    assert model.score.weight.dtype == torch.float32 and model.score.weight.requires_grad
    with torch.no_grad():
        logits = ml.Classify(LABELS).logits(model, batch_of())
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_messages_end_with_the_generation_prompt_and_texts_have_no_end():
    from helpers.chats import ours
    from minilora.data import encode_prompt

    chat, objective = ours("chatml"), ml.Classify(["a", "b"])
    messages = [{"role": "user", "content": "hello"}]
    encoded = objective.encode([{"messages": messages, "label": "b"}], chat, None)
    assert encoded[0].input_ids == encode_prompt(messages, chat) and encoded[0].label == 1
    (text,) = objective.encode([{"text": "abc", "label": "a", "source": "x"}], Letters(), None)
    assert text.input_ids == Letters().encode("abc") and set(text.labels) == {-100}
    cut = objective.encode([{"text": "abcdef", "label": "a", "source": "x"}], Letters(), 4)
    assert "1 rows cut at max_length 4" in cut.report and "keys not used: source" in cut.report


# ---- names of the labels


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a classifier that has learned ROWS."""
    folder = tmp_path_factory.mktemp("classifier")
    model = classifier()
    config = TrainConfig(**FAST | {"max_steps": 40})
    train(model, Letters(), ROWS, config, objective=ml.Classify(LABELS))
    ml.save_adapter(model, folder)
    return folder


def test_an_adapter_file_keeps_the_names_of_the_labels(saved):
    assert read_binding(saved / "adapter_model.safetensors")["labels"] == LABELS
    model, objective = llama(), ml.Classify(LABELS)
    objective.add_head(model)
    ml.load_adapter(model, saved)
    assert objective.predict(model, Letters(), TEXTS) == [row["label"] for row in ROWS]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            LABELS[::-1],
            r"other labels in another order: expected \['vowel', 'consonant', 'digit'\]",
        ),
        (["a", "b", "c"], r"other labels: expected .* got \['a', 'b', 'c'\]"),
    ],
)
def test_a_classifier_with_other_names_or_another_order_is_refused(saved, labels, message):
    model, other = llama(), ml.Classify(labels)
    other.add_head(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        ml.load_adapter(model, saved)
    assert {name: p for name, p in model.named_parameters()}.keys() == before.keys()

    model = llama()
    ml.Classify(LABELS).add_head(model)
    ml.load_adapter(model, saved)
    with pytest.raises(ValueError, match=r"was trained with \['vowel', 'consonant', 'digit'\], in"):
        other.predict(model, Letters(), TEXTS)
    rows = [{"text": "abc", "label": labels[0]}, {"text": "bcd", "label": labels[1]}]
    with pytest.raises(ValueError, match="was trained with"):
        train(model, Letters(), rows, TrainConfig(**FAST), objective=other)


def test_a_model_with_a_head_of_transformers_takes_the_names_of_the_file(causal, tmp_path):
    ours = classifier(twin(causal), modules_to_save=["score"])
    train(ours, Letters(), ROWS, TrainConfig(**FAST), objective=ml.Classify(LABELS))
    ml.save_adapter(ours, tmp_path)
    theirs = theirs_from(causal)
    ml.load_adapter(theirs, tmp_path)
    expected = ml.Classify(LABELS).predict(ours, Letters(), TEXTS)
    assert ml.Classify(LABELS).predict(theirs, Letters(), TEXTS) == expected
    with pytest.raises(ValueError, match="was trained with"):
        ml.Classify(LABELS[::-1]).predict(theirs, Letters(), TEXTS)


def test_names_in_a_transformers_config_have_an_order(causal):
    model = theirs_from(causal)
    model.config.id2label = dict(enumerate(LABELS))
    ml.Classify(LABELS).check_names(model)
    ml.Classify(["other", "names", "here"]).check_names(model)
    with pytest.raises(ValueError, match="was trained with"):
        ml.Classify(LABELS[::-1]).check_names(model)


def test_numbers_as_labels():
    letters = Letters()
    stars = ml.Classify(["1", "2", "3"])
    numbered = [{"text": "a", "label": 3}, {"text": "b", "label": "1"}]
    assert [text.label for text in stars.encode(numbered, letters, None)] == [2, 0]
    by_number = ml.Classify([0, 1])  # type: ignore[arg-type]  # numbers as labels work too
    assert [t.label for t in by_number.encode([{"text": "a", "label": 1}], letters, None)] == [1]
    with pytest.raises(ValueError, match=r"row 0: label 1 is a number.*names\[row\['label'\]\]"):
        ml.Classify(["negative", "positive"]).encode([{"text": "a", "label": 1}], letters, None)


def test_a_column_of_datasets_brings_its_names():
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS)})
    rows = Dataset.from_dict({"text": ["ab", "bc", "12"], "label": [0, 1, 2]}, features)
    encoded = ml.Classify(LABELS[::-1]).encode(rows, Letters(), None)
    assert [text.label for text in encoded] == [2, 1, 0]
    unlabelled = Dataset.from_dict({"text": ["ab"], "label": [-1]}, features)
    with pytest.raises(ValueError, match="label -1 is a number"):
        ml.Classify(LABELS).encode(unlabelled, Letters(), None)


# ---- errors


def test_errors():
    objective = ml.Classify(LABELS)
    with pytest.raises(ValueError, match=r"label.*'vowels'.*vowel"):
        objective.encode([{"text": "a", "label": "vowels"}], Letters(), None)
    with pytest.raises(ValueError, match="text and label"):
        objective.encode([{"prompt": "a", "completion": "b", "label": "vowel"}], Letters(), None)
    with pytest.raises(ValueError, match="no layer `score`"):
        objective.loss(llama(), batch_of())
    model = classifier()
    with pytest.raises(ValueError, match="3 outputs, and there are 2"):
        ml.Classify(["vowel", "consonant"]).loss(model, batch_of(ROWS[:2]))
    with pytest.raises(ValueError, match="already"):
        objective.add_head(model)
    for labels in (["one"], ["same", "same"]):
        with pytest.raises(ValueError, match="at least two, all different"):
            ml.Classify(labels)
