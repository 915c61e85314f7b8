"""From recorded decisions to results: small frozen dataclasses of numpy arrays, with units and axes in their
docstrings.

A `...Record` holds what was recorded, for all blocks (routing) or for one block (the rest); each metric is a
function record -> result, and `hydra_lab.figures` has a figure of the same name for every result.
"""

from hydra_lab.metrics.attention import SelectionRecord as SelectionRecord
from hydra_lab.metrics.attention import SelectionUse as SelectionUse
from hydra_lab.metrics.attention import num_candidates as num_candidates
from hydra_lab.metrics.attention import selection_use as selection_use
from hydra_lab.metrics.information import InformationTest as InformationTest
from hydra_lab.metrics.information import benjamini_hochberg as benjamini_hochberg
from hydra_lab.metrics.information import group_preference_p_values as group_preference_p_values
from hydra_lab.metrics.information import holm as holm
from hydra_lab.metrics.information import information_of_groups as information_of_groups
from hydra_lab.metrics.information import information_of_labels as information_of_labels
from hydra_lab.metrics.information import label_preference_p_values as label_preference_p_values
from hydra_lab.metrics.information import mean_interval as mean_interval
from hydra_lab.metrics.information import mutual_information as mutual_information
from hydra_lab.metrics.memory import BetaByDomain as BetaByDomain
from hydra_lab.metrics.memory import LookupRecord as LookupRecord
from hydra_lab.metrics.memory import MemoryMap as MemoryMap
from hydra_lab.metrics.memory import MemoryUse as MemoryUse
from hydra_lab.metrics.memory import TopTokens as TopTokens
from hydra_lab.metrics.memory import beta_by_domain as beta_by_domain
from hydra_lab.metrics.memory import gini as gini
from hydra_lab.metrics.memory import memory_map as memory_map
from hydra_lab.metrics.memory import memory_use as memory_use
from hydra_lab.metrics.memory import top_tokens as top_tokens
from hydra_lab.metrics.paired import PairingTest as PairingTest
from hydra_lab.metrics.paired import mcnemar_p_value as mcnemar_p_value
from hydra_lab.metrics.paired import pairing_test as pairing_test
from hydra_lab.metrics.paired import sign_flip_p_value as sign_flip_p_value
from hydra_lab.metrics.records import CaptureLike as CaptureLike
from hydra_lab.metrics.records import captured_path_use as captured_path_use
from hydra_lab.metrics.records import layers_of as layers_of
from hydra_lab.metrics.records import lookup_record as lookup_record
from hydra_lab.metrics.records import routing_record as routing_record
from hydra_lab.metrics.records import selection_record as selection_record
from hydra_lab.metrics.records import state_record as state_record
from hydra_lab.metrics.records import workspace_record as workspace_record
from hydra_lab.metrics.routing import CoActivation as CoActivation
from hydra_lab.metrics.routing import ExpertByChunk as ExpertByChunk
from hydra_lab.metrics.routing import ExpertByDomain as ExpertByDomain
from hydra_lab.metrics.routing import ExpertByPosition as ExpertByPosition
from hydra_lab.metrics.routing import ExpertLoad as ExpertLoad
from hydra_lab.metrics.routing import RoutingMap as RoutingMap
from hydra_lab.metrics.routing import RoutingRecord as RoutingRecord
from hydra_lab.metrics.routing import SwitchRate as SwitchRate
from hydra_lab.metrics.routing import co_activation as co_activation
from hydra_lab.metrics.routing import expert_by_chunk as expert_by_chunk
from hydra_lab.metrics.routing import expert_by_domain as expert_by_domain
from hydra_lab.metrics.routing import expert_by_position as expert_by_position
from hydra_lab.metrics.routing import expert_load as expert_load
from hydra_lab.metrics.routing import routing_map as routing_map
from hydra_lab.metrics.routing import switch_rate as switch_rate
from hydra_lab.metrics.ssm import HalfLife as HalfLife
from hydra_lab.metrics.ssm import StateNorms as StateNorms
from hydra_lab.metrics.ssm import StateRecord as StateRecord
from hydra_lab.metrics.ssm import half_life as half_life
from hydra_lab.metrics.ssm import state_norms as state_norms
from hydra_lab.metrics.workspace import SlotReads as SlotReads
from hydra_lab.metrics.workspace import SlotWrites as SlotWrites
from hydra_lab.metrics.workspace import WorkspaceRecord as WorkspaceRecord
from hydra_lab.metrics.workspace import slot_reads as slot_reads
from hydra_lab.metrics.workspace import slot_writes as slot_writes
from hydra_lab.path_use import IDLE_LOSS as IDLE_LOSS
from hydra_lab.path_use import IDLE_SHARE as IDLE_SHARE
from hydra_lab.path_use import PathUse as PathUse
