"""Interventions: change what a model decides or remembers while it runs, and leave it as it was.

    from hydra_lab.interventions import intervened

    with intervened(model, "moe[2].ablate(expert=3)", "memory[*].cut()"):
        model.generate(...)                     # or model(...), hydra_lab.record(...), a HydraLens trace

An intervention is a text, or an object of a class below; both can be mixed. `[2]` names a block (counted from 0), `[*]`
every block that has the path; several changes in one text stand between semicolons. In the order given, each works on
what the earlier ones made of a decision. They hold for every row of a batch, however it is padded; in one pass, in
pieces and in every decode step alike (tokens, chunks and blocks are counted from a row's first token); and for as long
as the context is open. Whoever reads a decision sees what the model goes on to use: `hydra_lab.record`, and a trace of
`HydraLens`, which may still overwrite it. The one thing that does not see them is `hydra_lab.decoding.DecodeGraph`,
which replays kernels and runs no code of the model.

    <path>[i].cut()                                   CutPath: the path (any of the five) adds nothing
    <path>[i].scale(factor=0.5)                       ScalePath: what it adds is multiplied

    moe[i].ablate(expert=2, renormalize=true)         AblateExpert: it adds nothing; the chunk's others take its weight
    moe[i].force(expert=2)                            ForceExperts: every chunk uses this one and no other
    moe[i].force(experts=[2, 5])                      ... these two and no others
    moe[i].route(experts=[[0, 1], [], [3]])           RouteChunks: the experts of chunk 0, 1, ...; [] leaves it
    moe[i].temperature(value=2.0)                     TemperRouting: softens (> 1) or sharpens (< 1) token weights

    memory[i].mask(addresses=[7, 9])                  MaskAddresses: nothing is read there (renormalize=false)
    memory[i].replace(source=7, target=9)             ReplaceAddress: whoever reads at 7 reads at 9
    memory[i].swap(first=7, second=9)                 SwapAddresses: and the other way round
    memory[i].beta(value=1.0)                         ClampBeta: the gate has one value
    memory[i].edit(address=7, value=[0.1, ...])       EditValue: the row holds another value; edits a fact

    workspace[i].zero(slot=3)                         ZeroSlot: readers find zeros in the slot
    workspace[i].freeze(slot=3, from_chunk=0)         FreezeSlot: nothing is written to it any more
    workspace[i].swap(first=3, second=4)              SwapSlots: readers find the two slots exchanged

    ssm[i].patch(position=63, state=[[[...]]])        PatchState: after that token, the last of a chunk, stands another
                                                      state, and all later tokens go on from it
    ssm[i].patch(..., head=1, kind="read")            ... one head's, for the read-out of that token alone
    ssm[i].scale_decay(head=1, factor=0.5)            ScaleDecay: log decay times the factor; the half-life doubles

    attention[i].forbid(blocks=[2, 3])                ForbidBlocks: the blocks are not selected
    attention[i].select(blocks=[2])                   SelectBlocks: they are selected, and no others

Each class says in its docstring what its arguments mean and how it treats the rest of the decision. A change that a
model cannot take (no such path, block, expert, slot, address or head) raises ValueError before anything is changed.

`str(change)` is the text form and `parse` reads it; `change.to_dict()` and `from_dict` are the JSON form, which
`dump_interventions` and `load_interventions` keep in a file; both forms carry every number exactly. `capture_state`
takes a state from one run to patch another with:

    state = capture_state(model, other_ids, block=2)
    with intervened(model, PatchState(block=2, position=63, state=state)):
        ...

and a fact is edited in one line, here a row of block 3 emptied:

    with intervened(model, EditValue(block=3, address=7, value=[0.0] * model.config.memory_value_size)):
        ...

`in_force(model)` says what a model runs with at the moment. `hydra-lab generate` and `hydra-lab capture` take
`--intervene TEXT` and `--intervene-file FILE.json`.

Where the ideas come from: interchange interventions and activation patching (Geiger et al., arXiv 2106.02997; Meng et
al., arXiv 2202.05262), in state-space models (Sharma et al., arXiv 2404.03646); rows of a memory as facts (Geva et al.,
arXiv 2012.14913); attention knockout (Geva et al., arXiv 2304.14767); temperature (Hinton et al., arXiv 1503.02531).
"""

from hydra_lab.interventions.attention import ForbidBlocks as ForbidBlocks
from hydra_lab.interventions.attention import SelectBlocks as SelectBlocks
from hydra_lab.interventions.base import Intervention as Intervention
from hydra_lab.interventions.context import in_force as in_force
from hydra_lab.interventions.context import intervened as intervened
from hydra_lab.interventions.memory import ClampBeta as ClampBeta
from hydra_lab.interventions.memory import EditValue as EditValue
from hydra_lab.interventions.memory import MaskAddresses as MaskAddresses
from hydra_lab.interventions.memory import ReplaceAddress as ReplaceAddress
from hydra_lab.interventions.memory import SwapAddresses as SwapAddresses
from hydra_lab.interventions.paths import CutPath as CutPath
from hydra_lab.interventions.paths import ScalePath as ScalePath
from hydra_lab.interventions.routing import AblateExpert as AblateExpert
from hydra_lab.interventions.routing import ForceExperts as ForceExperts
from hydra_lab.interventions.routing import RouteChunks as RouteChunks
from hydra_lab.interventions.routing import TemperRouting as TemperRouting
from hydra_lab.interventions.ssm import PatchState as PatchState
from hydra_lab.interventions.ssm import ScaleDecay as ScaleDecay
from hydra_lab.interventions.ssm import capture_state as capture_state
from hydra_lab.interventions.text import dump_interventions as dump_interventions
from hydra_lab.interventions.text import from_dict as from_dict
from hydra_lab.interventions.text import load_interventions as load_interventions
from hydra_lab.interventions.text import parse as parse
from hydra_lab.interventions.workspace import FreezeSlot as FreezeSlot
from hydra_lab.interventions.workspace import SwapSlots as SwapSlots
from hydra_lab.interventions.workspace import ZeroSlot as ZeroSlot
