"""Proves that a run refuses a folder that it must not use, before it reads its data."""

import pytest

from helpers.toy import FAST, Letters, lora
from minilora.training.config import TrainConfig
from minilora.training.loop import train


def unread():
    """Return rows that must not be read."""
    raise AssertionError("the rows were read")
    yield


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("a_file", {}, "output_dir: .*a_file is not writable .* Choose another folder"),
        ("earlier", {}, "holds checkpoints of an earlier run, up to step 3"),
        ("new", {"resume_from_checkpoint": "last"}, "holds no checkpoint"),
        ("new", {"resume_from_checkpoint": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_the_folder_of_a_run_is_checked_before_its_rows_are_read(
    tmp_path, folder, options, message
):
    (tmp_path / "a_file").touch()
    (tmp_path / "earlier" / "checkpoint-3").mkdir(parents=True)
    config = TrainConfig(output_dir=tmp_path / folder, **FAST, **options)
    with pytest.raises(ValueError, match=message):
        train(lora(), Letters(), unread(), config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_file", "earlier"]
