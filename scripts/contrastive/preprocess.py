"""Prepare the sets of a contrastive config: `preprocess.py CONFIG [--section.key value ...]`.

`dataset.name` (or `contrastive.sets`) says which: a known set, a dataset of the hub, a local file or folder, or ALL.
"""

import shlex
import sys

from neobert import cli
from neobert.config.command_line import parse_command_line
from neobert.errors import DataError


def main() -> None:
    config = parse_command_line(sys.argv[1:], description=str(__doc__))
    if config.task != "contrastive":
        raise DataError(f"task: {config.task} is for scripts/pretraining/preprocess.py")
    from neobert.contrastive.examples import FORM_WORDS
    from neobert.contrastive.prepare_sets import prepare, say_found
    from neobert.contrastive.set_folder import sets_folder

    for info, fresh in prepare(config, tell=say_found):
        negatives = f", up to {info.max_negatives} negatives" if info.max_negatives else ""
        word = "written" if fresh else "there already"
        size = f"{info.num_rows:,} {FORM_WORDS[info.form]}"
        print(f"{sets_folder(str(config.dataset.path)) / info.key}: {size}{negatives} ({word})")
    print("train on it with:")
    print(shlex.join(["python", "scripts/contrastive/finetune.py", *sys.argv[1:]]))


if __name__ == "__main__":
    cli.run(main, resumes=True)
