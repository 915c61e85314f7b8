"""Training: a staged curriculum, parameter groups and pickle-free checkpoints on top of transformers'
Trainer."""

from hydra_lab.training.run import TrainResult as TrainResult
from hydra_lab.training.run import train as train
