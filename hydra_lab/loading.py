"""Load a model with its tokenizer: the one that ships, or one from a directory."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hydra_lab.modeling import HydraForCausalLM

ASSETS = Path(__file__).resolve().parent / "assets"


def model_directory(name_or_path: str | Path = "demo") -> Path:
    """The directory that holds a model.

    Args:
        name_or_path: the name of a model that ships (`demo`), or a directory written by `save_pretrained`. A
            directory of that name in the working directory does not hide the shipped model; write `./demo` for it.

    Raises:
        ValueError: there is no such model.
    """
    shipped = ASSETS / str(name_or_path)
    path = shipped if str(name_or_path) == shipped.name and shipped.is_dir() else Path(name_or_path)
    if not (path / "config.json").is_file():
        names = sorted(folder.name for folder in ASSETS.glob("*") if (folder / "config.json").is_file())
        raise ValueError(
            f"no model {str(name_or_path)!r}: give a directory with a config.json"
            + (f", or the name of a model that ships ({', '.join(names)})" if names else "")
        )
    return path


def load(
    name_or_path: str | Path = "demo",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[HydraForCausalLM, PreTrainedTokenizerBase]:
    """Load a model, in evaluation mode, and its tokenizer. Nothing is fetched from a network.

    Args:
        name_or_path: as for `model_directory`.
        dtype: of the weights; the default, fp32, is exact on any device, whatever the file holds.
        device: where the weights go.

    Raises:
        ValueError: there is no such model, or what is there is not a Hydra.
    """
    path = model_directory(name_or_path)
    model = HydraForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    model.name_or_path = str(name_or_path)  # a capture says which model made it, on whatever machine
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.to(device).eval(), tokenizer
