"""Small views with their own JavaScript, for JupyterLab (as anywidgets) and, over the same modules, the dashboard."""

from hydra_lab.widgets.base import module_text as module_text
from hydra_lab.widgets.base import style_text as style_text
from hydra_lab.widgets.block_diagram import BlockDiagram as BlockDiagram
from hydra_lab.widgets.block_diagram import CostDiagram as CostDiagram
from hydra_lab.widgets.block_diagram import block_diagram_payload as block_diagram_payload
from hydra_lab.widgets.block_diagram import cost_diagram_payload as cost_diagram_payload
from hydra_lab.widgets.routing_lanes import RoutingLanes as RoutingLanes
from hydra_lab.widgets.routing_lanes import chunk_margins as chunk_margins
from hydra_lab.widgets.routing_lanes import routing_lanes_payload as routing_lanes_payload
from hydra_lab.widgets.text import shown as shown
from hydra_lab.widgets.text import token_texts as token_texts
from hydra_lab.widgets.text import visible as visible
from hydra_lab.widgets.token_strip import TokenStrip as TokenStrip
from hydra_lab.widgets.token_strip import token_strip_payload as token_strip_payload
from hydra_lab.widgets.token_strip import token_strip_svg as token_strip_svg
