"""The machinery of the lessons in `notebooks/`: predictions, checked exercises, the library's source on show.

A lesson uses `predict`, `check`, `check_close`, `passed`, `show_source` and `quick`. The notebooks themselves are
generated from their py:percent sources by `python -m hydra_lab.course.build`.
"""

from hydra_lab.course.exercises import NotYet as NotYet
from hydra_lab.course.exercises import check as check
from hydra_lab.course.exercises import check_close as check_close
from hydra_lab.course.exercises import passed as passed
from hydra_lab.course.predictions import Prediction as Prediction
from hydra_lab.course.predictions import predict as predict
from hydra_lab.course.reading import quick as quick
from hydra_lab.course.reading import show_source as show_source
