"""The program `minilora`, also in several processes: `torchrun -m minilora train`.

Under torchrun this file runs once in each process, each on a GPU of its own or on the CPU. It joins
the process group that `train` then uses.
"""

import os
import sys

import torch
import torch.distributed as dist

from minilora.cli.main import main
from minilora.training.process import main_speaks


def run() -> int:
    """Run the command in sys.argv.

    Returns:
        The exit status.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return main()
    if sys.argv[1:2] != ["train"]:
        print(
            "minilora: torchrun is for train; run every other command without it.", file=sys.stderr
        )
        return 2
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    with main_speaks():
        status = main()
    if status == 0:  # after an error other processes may wait for this one: torchrun ends them
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(run())
