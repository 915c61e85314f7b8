"""`make gpu-check`: the model on a GPU against the same model on the CPU, in fp32, with torch and transformers alone.

Logits, loss and gradients agree to 1e-3 of their largest value: a GPU sums in another order, and a token whose router
scores tie may choose another expert, which the seed here does not bring about. Greedy generation gives the same
tokens. Exit code 0 when all agree, 1 when something does not, 2 where there is no CUDA device.
"""

import platform
import sys
from typing import Any

import torch
import transformers
from torch import Tensor

from hydra_lab import HydraConfig, HydraForCausalLM

TOLERANCE = 1e-3
PRESETS = ("nano", "demo")


def largest_difference(left: Tensor, right: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest entry of the first."""
    return float((left - right.cpu()).abs().max() / left.abs().max().clamp(min=1e-30))


def differences(preset: str) -> dict[str, float]:
    """What differs between the two devices, by name."""
    torch.manual_seed(0)
    config = HydraConfig.from_preset(preset)
    model: Any = HydraForCausalLM(config).eval()
    tokens = torch.randint(config.vocab_size, (2, 300))
    mask = torch.ones_like(tokens)
    mask[1, :37] = 0

    def pass_over(device: str) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        placed = model.to(device)
        placed.zero_grad()
        out = placed(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            labels=tokens.masked_fill(mask == 0, -100).to(device),
        )
        out.loss.backward()
        gradients = {n: p.grad.cpu().clone() for n, p in placed.named_parameters() if p.grad is not None}
        made = placed.generate(
            input_ids=tokens[:, :64].to(device),
            attention_mask=torch.ones_like(tokens[:, :64]).to(device),
            max_new_tokens=32,
            min_new_tokens=32,
            do_sample=False,
        )
        logits = out.logits.detach().cpu()[mask.bool()]
        return logits, out.loss.detach().cpu(), gradients, made.cpu()

    logits, loss, gradients, made = pass_over("cpu")
    gpu_logits, gpu_loss, gpu_gradients, gpu_made = pass_over("cuda")
    found = {
        "logits": largest_difference(logits, gpu_logits),
        "loss": largest_difference(loss, gpu_loss),
        "generated tokens": float((made != gpu_made).float().mean()),
    }
    worst = max(gradients, key=lambda name: largest_difference(gradients[name], gpu_gradients[name]))
    found[f"gradient of {worst}"] = largest_difference(gradients[worst], gpu_gradients[worst])
    return found


def main() -> int:
    """Compare every preset and print what was found."""
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device, so nothing was checked", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    print(
        f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    failed = 0
    for preset in PRESETS:
        for name, difference in differences(preset).items():
            agrees = difference <= TOLERANCE
            failed += not agrees
            print(f"{'ok    ' if agrees else 'FAILED'} {preset}: {name} differs by {difference:.1e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
