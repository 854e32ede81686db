"""Fine-tuning: the loop (loop.py), and what it stands on, one file each."""

from minilora.train.config import TrainConfig
from minilora.train.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
