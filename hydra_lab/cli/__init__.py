"""The `hydra-lab` command line: `hydra-lab --help` lists the commands, and each explains itself with an example."""

from hydra_lab.cli.app import app as app
from hydra_lab.cli.app import main as main
