"""Which part of the model did it: logit lens and direct attribution, effective attention of the state-space paths, what
dense attention would have looked at, activation and path patching, gradients of decisions, and editing facts
in the memory.

Needs torch alone. Results are frozen dataclasses of numpy arrays; `hydra_lab.figures` has a figure for each.
"""

from hydra_lab.attribution.dense_attention import DenseAttention as DenseAttention
from hydra_lab.attribution.dense_attention import dense_attention as dense_attention
from hydra_lab.attribution.dense_attention import mean_coverage as mean_coverage
from hydra_lab.attribution.facts import FactEdit as FactEdit
from hydra_lab.attribution.facts import FactSpecificity as FactSpecificity
from hydra_lab.attribution.facts import edit_fact as edit_fact
from hydra_lab.attribution.facts import specificity as specificity
from hydra_lab.attribution.gradients import DecisionGradients as DecisionGradients
from hydra_lab.attribution.gradients import decision_gradients as decision_gradients
from hydra_lab.attribution.logits import DirectLogitAttribution as DirectLogitAttribution
from hydra_lab.attribution.logits import LogitLens as LogitLens
from hydra_lab.attribution.logits import direct_logit_attribution as direct_logit_attribution
from hydra_lab.attribution.logits import logit_lens as logit_lens
from hydra_lab.attribution.patching import ActivationPatching as ActivationPatching
from hydra_lab.attribution.patching import activation_patching as activation_patching
from hydra_lab.attribution.patching import logit_difference as logit_difference
from hydra_lab.attribution.path_patching import PathPatching as PathPatching
from hydra_lab.attribution.path_patching import path_patching as path_patching
from hydra_lab.attribution.sites import block_paths as block_paths
from hydra_lab.attribution.ssm import SSMAttention as SSMAttention
from hydra_lab.attribution.ssm import ssm_attention as ssm_attention
