"""From results to plotly figures: every result of `hydra_lab.metrics` and `hydra_lab.attribution` has a figure function
of the name of the function that made it.

Each takes `theme` ("light" or "dark") and, where it shows decisions of a path, `path_use`; none of them shows anything:
display the `go.Figure` that it returns.
"""

from hydra_lab.figures.attribution import activation_patching as activation_patching
from hydra_lab.figures.attribution import decision_gradients as decision_gradients
from hydra_lab.figures.attribution import direct_logit_attribution as direct_logit_attribution
from hydra_lab.figures.attribution import edit_fact as edit_fact
from hydra_lab.figures.attribution import logit_lens as logit_lens
from hydra_lab.figures.attribution import path_patching as path_patching
from hydra_lab.figures.attribution import specificity as specificity
from hydra_lab.figures.attribution import ssm_attention as ssm_attention
from hydra_lab.figures.export import NoBrowserError as NoBrowserError
from hydra_lab.figures.export import write_html as write_html
from hydra_lab.figures.export import write_png as write_png
from hydra_lab.figures.memory import beta_by_domain as beta_by_domain
from hydra_lab.figures.memory import memory_map as memory_map
from hydra_lab.figures.memory import memory_use as memory_use
from hydra_lab.figures.memory import top_tokens as top_tokens
from hydra_lab.figures.path_use import path_use as path_use
from hydra_lab.figures.routing import co_activation as co_activation
from hydra_lab.figures.routing import expert_by_chunk as expert_by_chunk
from hydra_lab.figures.routing import expert_by_domain as expert_by_domain
from hydra_lab.figures.routing import expert_by_position as expert_by_position
from hydra_lab.figures.routing import expert_load as expert_load
from hydra_lab.figures.routing import routing_map as routing_map
from hydra_lab.figures.routing import switch_rate as switch_rate
from hydra_lab.figures.state import half_life as half_life
from hydra_lab.figures.state import selection_use as selection_use
from hydra_lab.figures.state import slot_reads as slot_reads
from hydra_lab.figures.state import slot_writes as slot_writes
from hydra_lab.figures.state import state_norms as state_norms
from hydra_lab.figures.theme import Theme as Theme
from hydra_lab.figures.theme import colours as colours
from hydra_lab.figures.theme import template as template
