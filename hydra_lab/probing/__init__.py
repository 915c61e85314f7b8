"""What every probe shares: one schema for results, the way a study is run, and how it is calibrated.

A study (`probes/<name>/`) answers one question about a model. Its `run.py` holds `STUDY`, its `calibration.py` holds
`CALIBRATION`: the same code put to models whose truth is known.
"""

from hydra_lab.probing.findings import Effect as Effect
from hydra_lab.probing.findings import Finding as Finding
from hydra_lab.probing.findings import StudyResult as StudyResult
from hydra_lab.probing.findings import claims_anything as claims_anything
from hydra_lab.probing.findings import corrected as corrected
from hydra_lab.probing.study import Calibration as Calibration
from hydra_lab.probing.study import Outcome as Outcome
from hydra_lab.probing.study import Probe as Probe
from hydra_lab.probing.study import Study as Study
