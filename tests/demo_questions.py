"""Write demo_questions.jsonl, the evaluation questions that travel with the tests of the shipped model.

python tests/demo_questions.py CORPUS
"""

import json
import sys
from pathlib import Path

QUESTIONS = Path(__file__).with_suffix(".jsonl")
NUM_EACH = 80
KINDS = {
    "facts": {"form": "closed"},
    "recall": {"pairs": 8, "form": "as trained"},
    "chains": {"steps": 2, "form": "worked"},
}
"""By task, what the questions have in common."""


def choose(corpus: Path) -> list[dict[str, object]]:
    """The first questions of each kind of a corpus that `hydra_lab.data.build` wrote."""
    chosen: list[dict[str, object]] = []
    for task, kind in KINDS.items():
        lines = (corpus / f"eval_{task}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        fitting = [row for row in rows if all(row[name] == value for name, value in kind.items())]
        chosen += [{"task": task, **row} for row in fitting[:NUM_EACH]]
    return chosen


if __name__ == "__main__":
    text = "".join(json.dumps(row) + "\n" for row in choose(Path(sys.argv[1])))
    QUESTIONS.write_text(text, encoding="utf-8")
