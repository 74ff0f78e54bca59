"""Tokenise the data of a config once: `preprocess.py CONFIG [--section.key value ...] [--report] [--debug]`.

--report  measure lengths, unknown tokens and duplicates of what was written
--debug   write nothing; print the first rows of the run as text, with the measured mix of masks
"""

import sys

from neobert import cli
from neobert.config.command_line import parse_command_line
from neobert.errors import DataError
from neobert.output import print_result
from neobert.secrets import scrub

FLAGS = ("--debug", "--report")


def main() -> None:
    words = [word for word in sys.argv[1:] if word not in FLAGS]
    config = parse_command_line(words, description=str(__doc__))
    if config.task != "pretraining":
        raise DataError(f"task: {config.task} is for scripts/{config.task}/preprocess.py")
    from neobert.commands.preprocess import choose_config_name, prepare, write_command
    from neobert.commands.preview import preview
    from neobert.data.store.report import write_report

    if "--debug" in sys.argv:
        print_result(preview(config))
        return
    prepared, overrides = prepare(config, choose_config_name(words))
    for source in prepared:
        for note in source.inventory.notes():
            print(scrub(f"{source.spec.label}: {note}"))
        cli.say(*(f"warning: {text}" for text in source.inventory.warnings()))
        for split, manifest in source.manifests.items():
            print(
                f"{source.folder / split}: {manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens; "
                f"{manifest['bad']} records could not be read, {manifest['skipped']} had no text"
            )
            if "--report" in sys.argv:
                print(write_report(source.folder / split, config.dataset.max_seq_length).text)
    print("train on it with:")
    print(write_command(words, overrides))


if __name__ == "__main__":
    cli.run(main, resumes=True)
