"""From results to plotly figures: every result of `hydra_lab.metrics` has a figure function of its metric's name.

Each takes `theme` ("light" or "dark") and, where it shows decisions of a path, `path_use`; none of them shows anything:
display the `go.Figure` that it returns.
"""

from hydra_lab.figures.contexts import top_contexts as top_contexts
from hydra_lab.figures.export import NoBrowserError as NoBrowserError
from hydra_lab.figures.export import write_html as write_html
from hydra_lab.figures.export import write_png as write_png
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
from hydra_lab.figures.state import half_life as half_life
from hydra_lab.figures.state import selection_use as selection_use
from hydra_lab.figures.state import slot_reads as slot_reads
from hydra_lab.figures.state import slot_writes as slot_writes
from hydra_lab.figures.state import state_norms as state_norms
from hydra_lab.figures.theme import Theme as Theme
from hydra_lab.figures.theme import colours as colours
from hydra_lab.figures.theme import template as template
