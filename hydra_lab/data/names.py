"""Names that nobody bears, so that what is said of them can only be read in the context."""

import random
from collections.abc import Collection

_SYLLABLES = tuple(
    "ba be bo dar del dor fa fen gal gor hal hin jo kar kel lan lin mar mel mor nar nes nor or pel per quin ra rin sal "
    "sen tal tor tun ul van ver vin war wen yar zel zor".split()
)


def invent_name(rng: random.Random, taken: Collection[str] = ()) -> str:
    """Two or three syllables, such as "Fenmar"; never one of `taken`."""
    while True:
        name = "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))).capitalize()
        if name not in taken:
            return name


def invent_names(rng: random.Random, count: int) -> list[str]:
    """`count` different names."""
    names: list[str] = []
    while len(names) < count:
        names.append(invent_name(rng, names))
    return names
