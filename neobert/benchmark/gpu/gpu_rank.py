"""One of the processes that `gpu_runs.check_two_gpus` starts: trains, and writes down on which GPUs it has a context.

A process that touches the GPU of another one takes half a gigabyte of it, and its memory is not where it is looked for.
"""

import json
import os
import sys
from pathlib import Path

import torch

from neobert.config.load import load_config
from neobert.train.loop import pretrain


def main(config: str, folder: str) -> None:
    """Trains by a config file; `contexts-<rank>.json` in `folder` has the numbers of the GPUs."""
    pretrain(load_config(config))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    used = [number for number in range(count) if torch._C._cuda_hasPrimaryContext(number)]  # type: ignore[attr-defined]
    Path(folder, f"contexts-{os.environ['RANK']}.json").write_text(json.dumps(used))


if __name__ == "__main__":
    main(*sys.argv[1:])
