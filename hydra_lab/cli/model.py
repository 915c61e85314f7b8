"""Commands about one model: `info`, `accounting` and `generate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hydra_lab.cli.rules import (
    BadInput,
    Intervene,
    InterveneFile,
    count,
    interventions,
    load_model,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from hydra_lab.accounting import Accounting
    from hydra_lab.config import HydraConfig
    from hydra_lab.data.samples import Samples
    from hydra_lab.path_use import PathUse

commands = typer.Typer()

SAMPLE_TOKENS = 256
"""Length of the samples on which path use is measured."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for a program.")]
Model = Annotated[str, typer.Argument(help="`demo`, or a directory with a config.json.")]


@commands.command(
    epilog="Example: hydra-lab accounting --preset 1.6b --context 4096 --context 131072 --json",
)
def accounting(
    model: Annotated[str | None, typer.Argument(help="`demo`, or a directory with a config.json.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="A size instead of a model: nano, demo, 29m or 1.6b.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Context length in tokens; may be repeated. (default: 1024, 8192, 65536)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Parameters, compute per token and bytes of decode state, by component; from the configuration alone."""
    from hydra_lab.accounting import account

    if (model is None) == (preset is None):
        raise BadInput("accounting wants either a model or --preset")
    config = _preset(preset) if preset is not None else _config(str(model))
    result = account(config, tuple(context)) if context else account(config)
    if as_json:
        print_json({"model": model or preset, **result.to_dict()})
    else:
        _print_accounting(model or str(preset), result)


def _preset(name: str) -> "HydraConfig":
    from hydra_lab.config import HydraConfig

    return HydraConfig.from_preset(name)


def _config(model: str) -> "HydraConfig":
    from hydra_lab.config import HydraConfig
    from hydra_lab.loading import model_directory

    return HydraConfig.from_pretrained(model_directory(model))


def _print_accounting(name: str, result: "Accounting") -> None:
    parameters = result.parameters
    rows = [
        [part, f"{total:,}", f"{total / parameters.total:.1%}", f"{active:,}"]
        for part, (total, active) in parameters.by_component().items()
    ]
    rows.append(["all", f"{parameters.total:,}", "100.0%", f"{parameters.active:,}"])
    print_table(f"{name}: parameters", ["component", "total", "share", "active per token"], rows)
    columns = ["component"]
    for table in result.flops:
        columns += [f"prefill\n{table.context_length:,}", f"decode\n{table.context_length:,}"]
    parts = list(result.flops[0].by_component())
    rows = [
        [part, *(count(value) for table in result.flops for value in table.by_component()[part])]
        for part in parts
    ]
    rows.append(["all", *(count(value) for table in result.flops for value in (table.prefill, table.decode))])
    print_table("FLOPs per token, forward, by context length", columns, rows)
    parts = list(result.state[0].by_component())
    rows = [[part, *(f"{count(table.by_component()[part])}B" for table in result.state)] for part in parts]
    rows.append(["all", *(f"{count(table.num_bytes)}B" for table in result.state)])
    columns = ["component", *(f"at {table.context_length:,} tokens" for table in result.state)]
    print_table("Decode state of one sequence, fp32", columns, rows)


@commands.command(epilog="Example: hydra-lab generate demo 'Q: capital of France? A:' --max-new-tokens 20")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample within this mass.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    intervene: Intervene = None,
    intervene_file: InterveneFile = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt; the text appears as it is made.

    With --intervene a changed model does: hydra-lab generate demo Once --intervene 'moe[0].ablate(expert=2)'. What
    there is to change: python -m pydoc hydra_lab.interventions.
    """
    import torch
    from transformers import TextStreamer, set_seed

    from hydra_lab.interventions import intervened

    if temperature == 0 and (top_k is not None or top_p is not None):
        raise BadInput("--top-k and --top-p sample: give a --temperature above 0 too")
    if not prompt:
        raise BadInput("the prompt is empty")
    changes = interventions(intervene, intervene_file)
    loaded: Any  # transformers types `generate` for its own classes only
    loaded, tokenizer = load_model(model)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    set_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {
            "temperature": temperature,
            "top_k": top_k or 0,
            "top_p": 1.0 if top_p is None else top_p,
        }
    with intervened(loaded, *changes), torch.no_grad():
        if not as_json:
            print(prompt, end="", flush=True)
            sampling["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = loaded.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            **sampling,
        )
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        print_json(
            {
                "model": model,
                "prompt": prompt,
                "interventions": [str(change) for change in changes],
                "text": text,
                "tokens": new,
                "seed": seed,
            }
        )


@commands.command(epilog="Example: hydra-lab info demo --json")
def info(
    model: Model = "demo",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Measure path use on this: text, JSONL, or a directory per domain; may be repeated."
        ),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Measure path use on the held-out text of this training corpus.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the measurement beside the model, as path_use.json.")
    ] = False,
    samples: Annotated[int, typer.Option(min=2, help="Most samples of 256 tokens per domain.")] = 16,
    as_json: Json = False,
) -> None:
    """What a model is, how it was trained, and which of its paths are alive.

    Path use is what was recorded with the model, or else measured on the texts that came with it; --text and
    --corpus ask for a new measurement.
    """
    from hydra_lab.accounting import parameter_table
    from hydra_lab.data.sample_texts import SAMPLES_FILE
    from hydra_lab.loading import model_directory
    from hydra_lab.path_use import PATH_USE_FILE

    if text and corpus is not None:
        raise BadInput("give --text or --corpus, not both")
    if record and not (text or corpus):
        raise BadInput("--record keeps a measurement: give --text or --corpus too")
    directory = model_directory(model)
    config = _config(model)
    own_texts = directory / SAMPLES_FILE
    use = None if text or corpus else _recorded(directory)
    if text or corpus or (use is None and own_texts.is_file()):
        use = _measure(model, text or [own_texts], corpus, samples)
    if record and use is not None:
        (directory / PATH_USE_FILE).write_text(json.dumps(use.to_dict()) + "\n", encoding="utf-8")
    parameters = parameter_table(config)
    result: dict[str, Any] = {
        "model": model,
        "directory": str(directory),
        "parameters": {"total": parameters.total, "active": parameters.active},
        "blocks": config.num_hidden_layers,
        "paths": {
            path: config.layers_with(path) for path in ("ssm", "attention", "moe", "workspace", "memory")
        },
        "config": config.to_diff_dict(),
        "training": _json_file(directory / "training.json"),
        "evaluation": _json_file(directory / "evaluation.json"),
        "path_use": None if use is None else use.to_dict(),
        "operations": _operations(config),
    }
    if as_json:
        print_json(result)
    else:
        _print_info(result, use)


def _operations(config: "HydraConfig") -> list[dict[str, Any]]:
    """Which backend each operation runs on, on each device of this machine, with the times that `auto` chose by."""
    import torch

    from hydra_lab.ops.backend import current_backends, default_backend, device_name, measured_times

    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    rows: list[dict[str, Any]] = []
    for device in devices:
        name = device_name(device)
        with default_backend(cast(Any, config.ops_backend)):
            chosen = current_backends(torch.empty(0, device=device))
        for operation, backend in chosen.items():
            times = measured_times(name).get(operation)
            rows.append({"device": name, "operation": operation, "backend": backend, "milliseconds": times})
    return rows


def _measure(model: str, text: list[Path], corpus: Path | None, num_samples: int) -> "PathUse":
    from hydra_lab.capture.path_use import path_use_of_samples
    from hydra_lab.data.samples import samples_from_corpus

    loaded, tokenizer = load_model(model)
    if corpus is not None:
        samples = samples_from_corpus(corpus, num_tokens=SAMPLE_TOKENS, num_samples=num_samples)
    else:
        samples = _samples(text, tokenizer, num_samples)
    return path_use_of_samples(loaded, samples, progress=say)


def _samples(text: list[Path], tokenizer: Any, num_samples: int) -> "Samples":
    """The first windows of every domain that `text` holds; every token counts."""
    import numpy as np

    from hydra_lab.capture.sources import find_sources, windows
    from hydra_lab.data.samples import Samples

    kept: dict[str, list[Any]] = {}
    for window in windows(find_sources(text), tokenizer, SAMPLE_TOKENS):
        of_domain = kept.setdefault(window.domain, [])
        if len(of_domain) < num_samples and len(window.ids) > 1:
            of_domain.append(window.ids)
    rows = [(domain, ids) for domain, of_domain in kept.items() for ids in of_domain]
    if not rows:
        raise BadInput(f"no text in {', '.join(map(str, text))}")
    length = np.array([len(ids) for _, ids in rows])
    tokens = np.zeros((len(rows), SAMPLE_TOKENS), dtype=np.int64)
    for row, (_, ids) in enumerate(rows):
        tokens[row, : len(ids)] = ids
    inside = np.arange(SAMPLE_TOKENS) < length[:, None]
    return Samples(tokens=tokens, scored=inside, length=length, domains=tuple(domain for domain, _ in rows))


def _recorded(directory: Path) -> "PathUse | None":
    from hydra_lab.path_use import PATH_USE_FILE, read_path_use

    return read_path_use(directory) if (directory / PATH_USE_FILE).is_file() else None


def _json_file(path: Path) -> Any:
    """Content of a JSON file, None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from None


def _print_info(result: dict[str, Any], use: "PathUse | None") -> None:
    parameters = result["parameters"]
    print(
        f"{result['model']}: Hydra, {count(parameters['total'])} parameters, {count(parameters['active'])} active"
    )
    print(f"  in {result['directory']}")
    for path, blocks in result["paths"].items():
        print(f"  {path:<10} in blocks {', '.join(map(str, blocks))}" if blocks else f"  {path:<10} absent")
    training = result["training"]
    if training is not None:
        for run in (*training["earlier"], training):
            print(f"  trained on {count(run['tokens'])} tokens by {run['command']}")
    if result["evaluation"] is not None:
        rows = [
            [row["domain"], f"{row['bits_per_byte']:.3f}", f"{row['num_bytes']:,}"]
            for row in result["evaluation"]["domains"]
        ]
        print_table("Held-out text", ["domain", "bits per byte", "bytes"], rows)
        rows = [
            [
                f"{row['task']}: {row['group']}",
                f"{row['accuracy']:.1%}",
                f"{row['chance']:.1%}",
                str(row["num_questions"]),
            ]
            for row in result["evaluation"]["answers"]
        ]
        print_table("Answers", ["questions", "right", "chance", "n"], rows)
    for device in dict.fromkeys(row["device"] for row in result["operations"]):
        rows = [
            [row["operation"], row["backend"], _milliseconds(row["milliseconds"])]
            for row in result["operations"]
            if row["device"] == device
        ]
        print_table(f"Operations on {device}", ["operation", "backend", "measured, ms"], rows)
    if use is None:
        print("No path use was recorded with this model: measure it with --text FILE or --corpus DIR.")
    else:
        _print_path_use(use)


def _print_path_use(use: "PathUse") -> None:
    shares = [
        [str(layer), *(_number(use.share[row, column], ".1%") for column in range(len(use.paths)))]
        for row, layer in enumerate(use.layers)
    ]
    print_table("Share of the block's update, mean over held-out tokens", ["block", *use.paths], shares)
    costs = [
        [
            domain,
            f"{use.loss[column]:.3f}",
            *(f"{use.loss_increase[row, column]:+.3f}" for row in range(len(use.paths))),
            f"{use.num_tokens[column]:,}",
        ]
        for column, domain in enumerate(use.domains)
    ]
    print_table(
        "Loss added when a path is cut everywhere, nats per token",
        ["domain", "loss", *use.paths, "tokens"],
        costs,
    )
    for path in use.paths:
        print(use.describe(path))


def _milliseconds(times: dict[str, float] | None) -> str:
    if times is None:
        return "not measured (hydra-lab bench kernels --record)"
    return ", ".join(
        f"{backend} {time:.3g}" for backend, time in sorted(times.items(), key=lambda each: each[1])
    )


def _number(value: float, form: str) -> str:
    return "" if value != value else format(value, form)
