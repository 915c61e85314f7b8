"""Read and overwrite the model's decisions while it runs (needs nnsight)."""

from hydra_lab.lens.lens import HydraLens as HydraLens
