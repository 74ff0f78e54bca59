"""Commands about runs of many processes. Libraries are imported after the arguments are read."""

from pathlib import Path

from neobert import cli
from neobert.commands.flags import add_json, build_parser, count, print_answer


def benchmark_ranks(program: str, argv: list[str]) -> None:
    """What the data of a run costs each of many ranks: start, memory, state, and whether every row is read once.

    neobert benchmark-ranks FOLDER --ranks 512 --shards 100000

    Ranks are simulated one after the other, without a model. Tiny files are written to the folder, and kept.
    """
    parser = build_parser(program, benchmark_ranks.__doc__)
    parser.add_argument("folder", type=Path, help="where the files are written, or are from an earlier call")
    parser.add_argument("--ranks", type=count, default=24, help="default: %(default)s")
    parser.add_argument("--shards", type=count, default=500, help="files; default: %(default)s")
    add_json(parser)
    args = parser.parse_args(argv)
    from dataclasses import asdict

    from neobert.benchmark.simulated_ranks import simulate

    found = simulate(args.folder.absolute(), ranks=args.ranks, shards=args.shards, say=cli.say)
    print_answer(asdict(found), found.describe(), as_json=args.json)


GPU_NAMES = ("A100", "A100-40GB", "B200", "H100", "H200", "L4", "L40S", "RTX-4090")
"""Those of `peak.GPUS`, which needs torch."""


def size(program: str, argv: list[str]) -> None:
    """Memory of a GPU, micro-batch, speed, days and GPU-hours of a config on so many GPUs; computed, not measured.

    neobert size neobert_paper_1024 --gpus 64 --gpu H100
    neobert size CONFIG --gpus 16 --gpu A100 --parallel fsdp2 trainer.gradient_checkpointing=true

    Memory is counted on fake tensors, time is a model of the step; docs/scaling.md says how.
    """
    parser = build_parser(program, size.__doc__)
    parser.add_argument("config", help="YAML of a run, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", help="section.key=value laid over it")
    parser.add_argument("--gpus", type=count, required=True, help="how many")
    parser.add_argument("--gpu", choices=GPU_NAMES, default="H100", help="default: %(default)s")
    parser.add_argument("--parallel", choices=("ddp", "fsdp2", "hsdp"), help="default: each that makes a difference")
    parser.add_argument("--gpus-per-node", type=count, default=8, help="default: %(default)s")
    parser.add_argument("--network", type=count, default=400, help="Gbit/s of each GPU between nodes (default 400)")
    parser.add_argument("--mean-document", type=count, default=250, help="tokens; default: %(default)s")
    parser.add_argument("--vocab-size", type=count, help="where the config leaves it to the tokenizer")
    add_json(parser)
    args = parser.parse_intermixed_args(argv)
    from neobert.config.load import load_config

    config = load_config(args.config, args.overrides)
    from dataclasses import asdict

    from neobert.benchmark.cluster_size import Cluster, size_config
    from neobert.benchmark.size_table import describe_sizes

    cluster = Cluster(gpu=args.gpu, num_gpus=args.gpus, per_node=args.gpus_per_node, network=args.network * 1e9 / 8)
    sizes = size_config(config, cluster, args.parallel, args.vocab_size, args.mean_document)
    data = {"computed": True, "sizes": [asdict(one) | {"total": one.total} for one in sizes]}
    print_answer(data, describe_sizes(sizes), as_json=args.json)
