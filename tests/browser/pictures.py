"""Small grey pictures of the pages, kept to notice when one looks grossly different: a figure gone, another layout.

`python -m tests.browser.pictures` keeps those of the last run as what the pages look like now. Look at the screenshots
first.
"""

from pathlib import Path

import numpy as np
from PIL import Image

SCREENSHOTS = Path(__file__).parent / "screenshots"
KEPT = Path(__file__).parent / "pictures"
WIDTH = 120
"""Pixels: letters blur into grey lines, figures and boxes stay."""
NOTICEABLE = 24
"""Of 255 grey levels."""


def small(path: Path) -> Image.Image:
    """The picture in grey, `WIDTH` wide, each pixel the mean of the area that it stands for."""
    with Image.open(path) as picture:
        height = max(1, round(picture.height * WIDTH / picture.width))
        return picture.convert("L").resize((WIDTH, height), Image.Resampling.BOX)


def difference(seen: Image.Image, kept: Image.Image) -> float:
    """Share of the higher picture's area, 0..1, whose grey differs noticeably, or that the lower one lacks."""
    height = min(seen.height, kept.height)
    a, b = (np.asarray(each, dtype=np.int16)[:height] for each in (seen, kept))
    differing = int((np.abs(a - b) > NOTICEABLE).sum()) + abs(seen.height - kept.height) * WIDTH
    return differing / (max(seen.height, kept.height) * WIDTH)


def main() -> None:
    """Keep the small pictures of the pages in `SCREENSHOTS`, at every size and in both themes."""
    KEPT.mkdir(exist_ok=True)
    for old in KEPT.glob("*.png"):
        old.unlink()
    for path in sorted(SCREENSHOTS.glob("*-*-*.png")):
        if path.stem.endswith(("-light", "-dark")):
            small(path).save(KEPT / path.name, optimize=True)
            print(KEPT / path.name)


if __name__ == "__main__":
    main()
