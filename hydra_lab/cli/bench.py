"""Commands that measure: `bench throughput`, `bench kernels` and `bench capture`."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydra_lab.cli.rules import BadInput, print_json, print_table, require, without_progress_bars

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from hydra_lab.bench import BenchResult

commands = typer.Typer()
bench = typer.Typer(
    no_args_is_help=True,
    help="Measure speed and memory, side by side in one process.",
    epilog="Example: hydra-lab bench throughput --quick --json",
)
commands.add_typer(bench, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for a program.")]
Out = Annotated[Path | None, typer.Option(help="Keep the result as this JSON file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the result: a .html or .png file.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. (default: cuda where there is one)")]
Dtype = Annotated[
    str | None, typer.Option(help="float32 or bfloat16. (default: bfloat16 on a GPU, float32 on a CPU)")
]
Seed = Annotated[int, typer.Option(help="Of weights and inputs.")]

QUICK_CONTEXTS = (1024, 2048, 4096, 8192)
CPU_CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
GPU_CONTEXTS = (*CPU_CONTEXTS, 131072, 262144, 524288)


@bench.command(epilog="Example: hydra-lab bench throughput --quick --json")
def throughput(
    preset: Annotated[str, typer.Option(help="29m or 1.6b.")] = "29m",
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Prefill length in tokens; may be repeated. (default: 1K to 64K, on a GPU to 512K)"
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed prefills of each. (default: 3)")] = None,
    decode_steps: Annotated[int, typer.Option(min=1, help="Timed tokens behind each context.")] = 24,
    longest_seconds: Annotated[
        float, typer.Option(min=1.0, help="Leave a model out where one prefill would take longer.")
    ] = 600.0,
    training_context: Annotated[
        int | None, typer.Option(min=2, help="Also time a training step of this length. (on a GPU: 8192)")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="1K to 8K tokens of context, two rounds.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    out: Out = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Tokens per second and memory of Hydra, a transformer, a Mamba-2 and (on a GPU) a hybrid of equal size."""
    from hydra_lab.bench.throughput import ThroughputPlan, measure_throughput

    place, precision = _place(device, dtype)
    on_gpu = place.type == "cuda"
    contexts = context or (QUICK_CONTEXTS if quick else GPU_CONTEXTS if on_gpu else CPU_CONTEXTS)
    if min(contexts) < 1:
        raise BadInput(f"--context must be at least 1, got {min(contexts)}")
    plan = ThroughputPlan(
        preset=preset,
        contexts=tuple(sorted(set(contexts))),
        rounds=rounds or (2 if quick else 3),
        decode_steps=decode_steps,
        longest_seconds=longest_seconds,
        training_context=training_context or (8192 if on_gpu and not quick else None),
        device=place,
        dtype=precision,
        seed=seed,
    )
    _report(lambda progress: measure_throughput(plan, progress), out, plot, as_json, _print_throughput)


@bench.command(epilog="Example: hydra-lab bench kernels --json --out kernels.json")
def kernels(
    preset: Annotated[
        str | None, typer.Option(help="Whose sizes. (default: 29m on a CPU, 1.6b on a GPU)")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens. (default: 2048 on a CPU, 8192 on a GPU)")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contestant.")] = 7,
    record: Annotated[
        bool,
        typer.Option("--record", help="Let `auto` choose by these times on this device (measured.json)."),
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    out: Out = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Every operation: its backends, what others offer for it, and how near each comes to the device's limits."""
    from hydra_lab.bench.kernels import KernelsPlan, measure_kernels, record_measured

    place, precision = _place(device, dtype)
    on_gpu = place.type == "cuda"
    plan = KernelsPlan(
        preset=preset or ("1.6b" if on_gpu else "29m"),
        length=length or (8192 if on_gpu else 2048),
        attention_lengths=(16384, 65536) if on_gpu else (8192,),
        path_lengths=(8192,) if on_gpu else (2048, 8192),
        rounds=rounds,
        least_seconds=0.02 if on_gpu else 0.1,
        device=place,
        dtype=precision,
        seed=seed,
    )
    result = _report(lambda progress: measure_kernels(plan, progress), out, plot, as_json, _print_kernels)
    if record:
        record_measured(result)


@bench.command(epilog="Example: hydra-lab bench capture --json")
def capture(
    hidden_size: Annotated[int, typer.Option(min=64, help="Width of the model, a multiple of 64.")] = 512,
    length: Annotated[int, typer.Option(min=1, help="Tokens.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contestant.")] = 15,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    out: Out = None,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """What it costs to look: idle taps, `record`, a trace of everything, and kernels that report what they decide."""
    from hydra_lab.bench.capture import CapturePlan, measure_capture

    if hidden_size % 64:
        raise BadInput(f"--hidden-size must be a multiple of 64, got {hidden_size}")
    place, precision = _place(device, dtype)
    plan = CapturePlan(
        hidden_size=hidden_size, length=length, rounds=rounds, device=place, dtype=precision, seed=seed
    )
    _report(lambda progress: measure_capture(plan, progress), out, plot, as_json, _print_capture)


def _place(device: str | None, dtype: str | None) -> "tuple[torch.device, torch.dtype]":
    import torch

    available = torch.cuda.is_available()
    name = device or ("cuda" if available else "cpu")
    if name not in ("cpu", "cuda"):
        raise BadInput(f"--device is cpu or cuda, not {name}")
    if name == "cuda" and not available:
        raise BadInput("--device cuda: this machine has no CUDA device")
    precisions = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    precision = dtype or ("bfloat16" if name == "cuda" else "float32")
    if precision not in precisions:
        raise BadInput(f"--dtype is float32 or bfloat16, not {precision}")
    return torch.device(name), precisions[precision]


def _report(
    measure: "Callable[[Callable[[str], None]], BenchResult]",
    out: Path | None,
    plot: Path | None,
    as_json: bool,
    show: "Callable[[BenchResult], None]",
) -> "BenchResult":
    """Measure under a progress line, then keep, print and draw."""
    import transformers

    if plot is not None:
        require("plotly", "kaleido")
        if plot.suffix not in (".html", ".png"):
            raise BadInput(f"--plot wants a .html or .png file, got {plot}")
    without_progress_bars()
    transformers.utils.logging.set_verbosity_error()  # which kernels a peer lacks is part of the result
    with _progress() as progress:
        result = measure(progress)
    if out is not None:
        result.save(out)
    if as_json:
        print_json(result.to_dict())
    else:
        _print_environment(result)
        show(result)
        _print_goals(result)
    if plot is not None:  # last: it may need a browser that is not there
        _draw(result, plot)
    return result


@contextmanager
def _progress() -> "Iterator[Callable[[str], None]]":
    """A spinner on stderr with the time so far; how many steps a bench has depends on what it finds."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what: bar.update(task, description=what)


def _draw(result: "BenchResult", path: Path) -> None:
    from hydra_lab.bench.plots import plot_result
    from hydra_lab.figures.export import NoBrowserError, write_html, write_png

    write = write_png if path.suffix == ".png" else write_html
    try:
        write({path.stem: plot_result(result)}, path.parent)
    except NoBrowserError as error:
        raise BadInput(f"{path} was not drawn: {error}; a .html plot needs no browser") from error


def _print_environment(result: "BenchResult") -> None:
    environment = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    hardware = environment["hardware"]
    print(f"{environment['device']} ({hardware['cpu']}, {hardware['threads']} threads); {versions}")
    print(", ".join(f"{name} {value}" for name, value in result.settings.items()))


def _print_throughput(result: "BenchResult") -> None:
    rows = [
        [
            f"{row['phase']} {row['context']:,}, {row['model']}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second_q25']:,.0f}-{row['tokens_per_second_q75']:,.0f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
            _times(row["hydra_times_faster"]),
        ]
        for row in result.rows
    ]
    columns = ["", "tokens/s", "quartiles", "peak GiB", "Hydra faster by"]
    print_table("Throughput, batch 1", columns, rows)
    for peer, found in result.findings["crossover"].items():
        print(
            f"Hydra's prefill is faster than {peer} from {found['value']:,.0f} tokens "
            f"(95% interval {found['low']:,.0f} to {found['high']:,.0f}; {found['note']})"
        )
    parts = list(result.findings["time"][0]["seconds"])
    rows = [
        [
            f"{found['context']:,}",
            *(f"{found['seconds'][part] / found['seconds']['total']:.0%}" for part in parts[:-1]),
            f"{found['seconds']['total'] * 1e3:,.0f}",
            f"{found['of_matmul']:.0%}",
        ]
        for found in result.findings["time"]
    ]
    print_table("Where Hydra's prefill spends its time", ["context", *parts[:-1], "ms", "of matmul"], rows)
    training = result.findings.get("training")
    if training is not None:
        print(
            f"Training step at {training['context']:,} tokens: {training['tokens_per_second']:,.0f} tokens/s, peak "
            f"{training['peak_bytes'] / 2**30:.1f} GiB above the weights, model FLOP utilisation "
            f"{training['model_flops_utilisation']:.1%}"
        )


def _print_kernels(result: "BenchResult") -> None:
    for direction in dict.fromkeys(row["direction"] for row in result.rows):
        rows = [
            [
                f"{row['operation']} {row['length']:,}: {row['contestant']}",
                f"{row['ms']:.3g}",
                f"{row['ms_q25']:.3g}-{row['ms_q75']:.3g}",
                "" if row["over_torch"] is None else f"{row['over_torch']['value']:.2f}",
                f"{row['of_matmul']:.0%}",
                "" if row["of_copy"] is None else f"{row['of_copy']:.0%}",
            ]
            for row in result.rows
            if row["direction"] == direction
        ]
        columns = ["", "ms", "quartiles", "x torch", "of matmul", "of copy"]
        print_table(f"Operations, {direction}, batch 1", columns, rows)
    rows = [
        [
            f"{each['operation']}: {each['backend']}",
            f"{each['output']:.1e}",
            "" if each["gradient"] is None else f"{each['gradient']:.1e}",
        ]
        for each in result.findings["agreement"]
    ]
    print_table(
        f"Largest error against the reference, {result.findings['agreement_length']} tokens",
        ["", "output", "gradients"],
        rows,
    )


def _print_capture(result: "BenchResult") -> None:
    rows = [
        [
            f"{row['subject']}: {row['contestant']}",
            f"{row['ms']:.3g}",
            f"{row['ms_q25']:.3g}-{row['ms_q75']:.3g}",
            f"{row['over_plain']['value'] - 1:+.1%}",
            f"{row['over_plain']['low'] - 1:+.1%} to {row['over_plain']['high'] - 1:+.1%}",
        ]
        for row in result.rows
    ]
    print_table("What looking costs", ["", "ms", "quartiles", "more", "95% interval"], rows)


def _print_goals(result: "BenchResult") -> None:
    for goal in result.goals:
        interval = "" if goal.low == goal.high else f" (95% interval {goal.low:.3g} to {goal.high:.3g})"
        verdict = "reached" if goal.reached else "MISSED"
        print(f"{verdict}: {goal.measure}: {goal.value:.3g}{interval}; goal: {goal.goal}")
    for reason in dict.fromkeys(result.skipped.values()):
        names = [name for name, given in result.skipped.items() if given == reason]
        print(f"not measured ({reason}): {', '.join(names)}")


def _times(ratio: dict[str, Any] | None) -> str:
    return "" if ratio is None else f"{ratio['value']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"
