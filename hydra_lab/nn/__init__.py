"""The paths of a Hydra block and the block itself.

Shape suffixes in this package (the taps' own are in `hydra_lab.taps`):

    B  rows            L  positions of this piece     D  hidden size       C  chunks       T  tokens of one chunk
    H  heads           P  channels per ssm head       N  ssm state size    G  ssm groups
    E  experts         K  entries of a top-k          F  expert hidden     S  slots        V  value width

Every path is called as `path(hidden_BLD, span, state) -> (update_BLD, new_state)`: `hidden` is already normalised,
`span` says where the piece lies, and `state` is what the path keeps of earlier pieces (None at the start).
"""
