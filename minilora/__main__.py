"""The command line as a program: `minilora`, `python -m minilora`, and `torchrun -m minilora train`, in processes.

Under torchrun this is one of its processes, on a GPU of its own or on the CPU: what it joins here, `train` finds.
"""

import os
import sys

import torch
import torch.distributed as dist

from minilora.cli.main import main
from minilora.training.process import main_speaks


def run() -> int:
    """The exit status of the command in sys.argv."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return main()
    if sys.argv[1:2] != ["train"]:
        print("minilora: torchrun is for train; run every other command without it.", file=sys.stderr)
        return 2
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with main_speaks():
        status = main()
    if status == 0:  # after an error others may wait for this process: torchrun ends them
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(run())
