"""JSON and CSV records: about real cities, and random ones whose columns depend on each other."""

import csv
import io
import json
import random
from collections.abc import Iterator

from hydra_lab.data.document import Document
from hydra_lab.data.world import World

_ITEMS = (
    "bolt",
    "cable",
    "drill",
    "glove",
    "hinge",
    "lamp",
    "nail",
    "pump",
    "rope",
    "screw",
    "valve",
    "wheel",
)
_COLOURS = ("black", "blue", "green", "grey", "red", "white")


def _city_records(world: World, rng: random.Random, size: int) -> list[dict[str, str | int]]:
    columns = ["country", "country_code", "continent", "population"]
    kept = sorted(rng.sample(range(len(columns)), rng.randint(2, 4)))
    records: list[dict[str, str | int]] = []
    for city in rng.choices(world.cities, k=size):
        record: dict[str, str | int] = {"city": city.name}
        record.update({columns[i]: getattr(city, columns[i]) for i in kept})
        records.append(record)
    return records


def _order_records(rng: random.Random, size: int) -> list[dict[str, str | int]]:
    first = rng.randrange(100, 900)
    records: list[dict[str, str | int]] = []
    for number in range(first, first + size):
        item, colour, quantity, price = (
            rng.choice(_ITEMS),
            rng.choice(_COLOURS),
            rng.randint(1, 9),
            rng.randint(1, 9),
        )
        records.append(
            {
                "id": number,
                "item": item,
                "colour": colour,
                "sku": f"{item}-{colour}-{number}",
                "quantity": quantity,
                "price": price,
                "total": quantity * price,
            }
        )
    return records


def structured_documents(world: World, rng: random.Random) -> Iterator[Document]:
    """Record documents without end: JSON lines, indented JSON or CSV, of cities or of orders, 3 to 12 records."""
    while True:
        size = rng.randint(3, 12)
        records = _city_records(world, rng, size) if rng.random() < 0.6 else _order_records(rng, size)
        form = rng.choice(("json lines", "json", "csv"))
        if form == "json lines":
            text = "".join(json.dumps(record) + "\n" for record in records)
        elif form == "json":
            text = json.dumps(records[:4], indent=1) + "\n"
        else:
            buffer = io.StringIO()
            writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
            text = buffer.getvalue()
        yield Document(text, form=form)
