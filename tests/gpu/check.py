"""`make gpu-check`: what only a GPU can show, with the Python that is there (torch, transformers, pytest; no .venv).

1. Every kernel against its reference, with gradients, in fp32 and bf16 (`tests/kernels`).
2. The model on the GPU, on the torch and on the Triton backend, against the same model on the CPU, in fp32: logits,
   loss and gradients agree to 1e-3 of their largest value (a GPU sums in another order; a token whose router scores tie
   may choose another expert, which the seed here does not bring about), and greedy generation gives the same tokens.
3. `hydra-lab bench kernels --record` and `bench capture`.

Results go to `--out` (default build/gpu): kernels.json, capture.json and the measured.json that `auto` chooses by. Exit
code 0 when all agree, 1 when something does not, 2 where there is no CUDA device.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hydra_lab import HydraConfig, HydraForCausalLM
from hydra_lab.ops import use_backend
from hydra_lab.ops.backend import MEASURED, Backend

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3
PRESETS = ("nano", "demo")
BACKENDS: tuple[Backend, ...] = ("torch", "triton")


def largest_difference(left: Tensor, right: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest entry of the first."""
    return float((left - right.cpu()).abs().max() / left.abs().max().clamp(min=1e-30))


def pass_over(model: Any, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Logits of the tokens present, loss, gradients by name, and 32 generated tokens, on the model's device."""
    device = model.device
    model.zero_grad()
    out = model(
        input_ids=tokens.to(device),
        attention_mask=mask.to(device),
        labels=tokens.masked_fill(mask == 0, -100).to(device),
    )
    out.loss.backward()
    gradients = {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
    made = model.generate(
        input_ids=tokens[:, :64].to(device),
        attention_mask=torch.ones_like(tokens[:, :64]).to(device),
        max_new_tokens=32,
        min_new_tokens=32,
        do_sample=False,
    )
    return out.logits.detach().cpu()[mask.bool()], out.loss.detach().cpu(), gradients, made.cpu()


def differences(preset: str) -> dict[str, float]:
    """What differs between the devices, by backend and name."""
    torch.manual_seed(0)
    config = HydraConfig.from_preset(preset)
    model: Any = HydraForCausalLM(config).eval()
    tokens = torch.randint(config.vocab_size, (2, 300))
    mask = torch.ones_like(tokens)
    mask[1, :37] = 0
    logits, loss, gradients, made = pass_over(model, tokens, mask)
    model = model.to("cuda")
    found: dict[str, float] = {}
    for backend in BACKENDS:
        with use_backend(backend):
            gpu_logits, gpu_loss, gpu_gradients, gpu_made = pass_over(model, tokens, mask)
        found[f"{backend}, logits"] = largest_difference(logits, gpu_logits)
        found[f"{backend}, loss"] = largest_difference(loss, gpu_loss)
        found[f"{backend}, generated tokens"] = float((made != gpu_made).float().mean())
        worst = max(gradients, key=lambda name: largest_difference(gradients[name], gpu_gradients[name]))
        found[f"{backend}, gradient of {worst}"] = largest_difference(gradients[worst], gpu_gradients[worst])
    return found


def check_model() -> bool:
    """Compare every preset and print what was found."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    agree = True
    for preset in PRESETS:
        for name, difference in differences(preset).items():
            agrees = difference <= TOLERANCE
            agree &= agrees
            print(
                f"{'ok    ' if agrees else 'FAILED'} {preset}: {name} differs by {difference:.1e}", flush=True
            )
    return agree


def succeeds(what: str, *arguments: str) -> bool:
    """Run a Python module in a process of its own."""
    print(f"--- {what}", flush=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return (
        subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, check=False).returncode
        == 0
    )


def main() -> int:
    """Run the three parts, all of them even where one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    parser.add_argument("--workers", type=int, default=8, help="processes of the kernel tests")
    parser.add_argument("--no-bench", action="store_true", help="leave the third part out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device, so nothing was checked", file=sys.stderr)
        return 2
    print(
        f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        flush=True,
    )
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # Without the project's own settings, which name plugins and warnings of the versions that CI pins.
    pytest = [
        "pytest",
        "-c",
        os.devnull,
        f"--rootdir={ROOT}",
        "--import-mode=importlib",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    passed = [
        succeeds(
            "kernels against their references",
            *pytest,
            "-n",
            str(options.workers),
            "tests/kernels",
            "--ignore=tests/kernels/test_compile.py",
        )
    ]
    print("--- the model against the CPU", flush=True)
    passed.append(check_model())
    if not options.no_bench:
        bench = ("hydra_lab", "bench")
        passed.append(succeeds("speed", *bench, "kernels", "--record", "--out", str(out / "kernels.json")))
        passed.append(succeeds("cost of looking", *bench, "capture", "--out", str(out / "capture.json")))
        if MEASURED.is_file():
            shutil.copy(MEASURED, out / MEASURED.name)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
