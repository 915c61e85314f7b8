"""From results to plotly figures: every result of `hydra_lab.metrics` and `hydra_lab.attribution` has a figure function
of the name of the function that made it.

Each takes `theme` ("light" or "dark") and, where it shows decisions of a path, `path_use`; none of them shows anything:
display the `go.Figure` that it returns.
"""

from hydra_lab.figures.attention import hit_rate as hit_rate
from hydra_lab.figures.attention import mass_by_kind as mass_by_kind
from hydra_lab.figures.attention import selection_use as selection_use
from hydra_lab.figures.attribution import activation_patching as activation_patching
from hydra_lab.figures.attribution import decision_gradients as decision_gradients
from hydra_lab.figures.attribution import direct_logit_attribution as direct_logit_attribution
from hydra_lab.figures.attribution import edit_fact as edit_fact
from hydra_lab.figures.attribution import logit_lens as logit_lens
from hydra_lab.figures.attribution import path_patching as path_patching
from hydra_lab.figures.attribution import specificity as specificity
from hydra_lab.figures.attribution import ssm_attention as ssm_attention
from hydra_lab.figures.contexts import top_contexts as top_contexts
from hydra_lab.figures.export import NoBrowserError as NoBrowserError
from hydra_lab.figures.export import to_csv as to_csv
from hydra_lab.figures.export import write_html as write_html
from hydra_lab.figures.export import write_png as write_png
from hydra_lab.figures.loss import loss_by_domain as loss_by_domain
from hydra_lab.figures.memory import address_overlap as address_overlap
from hydra_lab.figures.memory import beta_by_domain as beta_by_domain
from hydra_lab.figures.memory import dead_addresses as dead_addresses
from hydra_lab.figures.memory import memory_map as memory_map
from hydra_lab.figures.memory import memory_use as memory_use
from hydra_lab.figures.memory import memory_use_by_domain as memory_use_by_domain
from hydra_lab.figures.memory import memory_use_by_head as memory_use_by_head
from hydra_lab.figures.memory import top_tokens as top_tokens
from hydra_lab.figures.path_use import path_use as path_use
from hydra_lab.figures.router import expert_sparsity as expert_sparsity
from hydra_lab.figures.router import router_saturation as router_saturation
from hydra_lab.figures.router import routing_margin as routing_margin
from hydra_lab.figures.router import specialization as specialization
from hydra_lab.figures.routing import co_activation as co_activation
from hydra_lab.figures.routing import expert_by_chunk as expert_by_chunk
from hydra_lab.figures.routing import expert_by_domain as expert_by_domain
from hydra_lab.figures.routing import expert_by_position as expert_by_position
from hydra_lab.figures.routing import expert_by_token_class as expert_by_token_class
from hydra_lab.figures.routing import expert_load as expert_load
from hydra_lab.figures.routing import routing_map as routing_map
from hydra_lab.figures.routing import switch_rate as switch_rate
from hydra_lab.figures.ssm import half_life as half_life
from hydra_lab.figures.ssm import half_life_by_domain as half_life_by_domain
from hydra_lab.figures.ssm import half_life_by_position as half_life_by_position
from hydra_lab.figures.ssm import mixing_distance as mixing_distance
from hydra_lab.figures.ssm import norm_growth as norm_growth
from hydra_lab.figures.ssm import receptive_field as receptive_field
from hydra_lab.figures.ssm import state_norms as state_norms
from hydra_lab.figures.ssm import state_saturation as state_saturation
from hydra_lab.figures.theme import Theme as Theme
from hydra_lab.figures.theme import colours as colours
from hydra_lab.figures.theme import template as template
from hydra_lab.figures.workspace import read_entropy as read_entropy
from hydra_lab.figures.workspace import read_lag as read_lag
from hydra_lab.figures.workspace import slot_reads as slot_reads
from hydra_lab.figures.workspace import slot_writes as slot_writes
from hydra_lab.figures.workspace import write_entropy as write_entropy
