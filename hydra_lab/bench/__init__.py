"""Measurements of speed and memory: side by side in one process, with all that is needed to read them.

`throughput` compares whole models, `kernels` single operations, `capture` the cost of looking. Each returns a
`BenchResult`; `hydra-lab bench` prints, saves and draws it. On a shared CPU only ratios
within one result mean anything.
"""

from hydra_lab.bench.result import BenchResult as BenchResult
from hydra_lab.bench.timing import Timing as Timing
