"""Text for training and evaluation: eight domains, their tokenizer, the packed corpus and the n-gram baseline.

Build a corpus with `python -m hydra_lab.data.build OUT`, read it with `MixtureDataset`.
"""

from hydra_lab.data.domains import DOMAINS as DOMAINS
from hydra_lab.data.domains import NATURAL_DOMAINS as NATURAL_DOMAINS
from hydra_lab.data.mixture import IGNORED_LABEL as IGNORED_LABEL
from hydra_lab.data.mixture import MixtureDataset as MixtureDataset
from hydra_lab.data.packing import PackedTokens as PackedTokens
from hydra_lab.data.tokenizer import load_tokenizer as load_tokenizer
