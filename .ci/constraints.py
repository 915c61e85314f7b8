"""Write constraints.txt: the versions, in this environment, of everything the project's extras install.

Run it with the environment's own Python (`make constraints`) after upgrading packages; review the diff. The `gpu`
extra is left out: what it installs depends on the CUDA build of torch that a machine has.
"""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "hydra-lab"
EXTRAS = ("lab", "train", "scale", "kernels", "dev")
HEADER = """\
# The versions that the tests run with. Written by `make constraints`; used by `make setup` as `pip install -c`.
# Libraries that only a CUDA build of torch brings along are pinned by torch itself.
"""


def installed_closure(distribution: str, extras: tuple[str, ...]) -> dict[str, str]:
    """Versions by canonical name of all that `distribution[extras]` needs here, itself left out.

    Raises:
        importlib.metadata.PackageNotFoundError: a needed package is not installed.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    todo = [(distribution, extras)]
    while todo:
        name, wanted = todo.pop()
        key = (canonicalize_name(name), tuple(sorted(wanted)))
        if key in seen:
            continue
        seen.add(key)
        package = metadata.distribution(name)
        versions[key[0]] = package.version.split("+")[0]  # a pin must not name a local build such as +cpu
        for line in package.requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                todo.append((requirement.name, tuple(requirement.extras)))
    del versions[canonicalize_name(distribution)]
    return versions


if __name__ == "__main__":
    versions = installed_closure(DISTRIBUTION, EXTRAS)
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    (ROOT / "constraints.txt").write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"constraints.txt: {len(lines)} packages")
