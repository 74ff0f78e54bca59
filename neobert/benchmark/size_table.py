"""What `neobert size` prints of the sizes it computed."""

from neobert.benchmark.cluster_size import Size


def describe_sizes(sizes: list[Size]) -> str:
    """A table of the ways to run it."""
    lines = [
        "Computed, not measured: memory counted on fake tensors, time by a model of the step.",
        "",
        "| | " + " | ".join(f"{size.parallel}, {size.num_gpus} x {size.gpu}" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    rows: dict[str, list[str]] = {}

    def add(label: str, values: list[str]) -> None:
        rows[label] = values

    add("micro-batch x accumulation", [_show_batch(size) for size in sizes])
    for name in ("weights", "gradients", "optimizer", "average", "gathered", "activations", "loss", "reserved"):
        if any(getattr(size, name) for size in sizes):
            add(f"{name}, GB", [f"{getattr(size, name) / 1e9:.1f}" for size in sizes])
    add("memory of a GPU, GB", [f"{size.total / 1e9:.1f} of {size.capacity / 1e9:.0f}" for size in sizes])
    add("row slots a second", [_when_fits(size, f"{size.slots_per_second:,.0f}") for size in sizes])
    add("MFU", [_when_fits(size, f"{size.mfu:.0%}") for size in sizes])
    if sizes[0].days is not None:
        add("days", [_when_fits(size, f"{size.days:,.1f}") for size in sizes])
        add("GPU-hours", [_when_fits(size, f"{size.gpu_hours:,.0f}") for size in sizes])
    return "\n".join([*lines, *(f"| {label} | {' | '.join(values)} |" for label, values in rows.items())])


def _show_batch(size: Size) -> str:
    return f"{size.micro_batch_rows} rows x {size.accumulation}" if size.micro_batch_rows else "does not fit"


def _when_fits(size: Size, text: str) -> str:
    return text if size.micro_batch_rows else "-"
