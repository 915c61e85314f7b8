"""Facts have one answer, are all in training, and the withheld phrasings are not."""

import csv
import io
import json
import random
import re
from itertools import islice

from hydra_lab.data.evaluation import fact_questions
from hydra_lab.data.structured import structured_documents
from hydra_lab.data.world import World, closed_documents, open_documents


def asked(text: str) -> list[tuple[str, str]]:
    """(prompt, answer) of each question line."""
    pairs: list[tuple[str, str]] = []
    for line in text.splitlines():
        match = re.fullmatch(r"(Q: .*\? A:|[^:]*:) (.*)", line)
        assert match, line
        pairs.append((match[1], match[2]))
    return pairs


def test_table(places: World) -> None:
    assert 6_000 <= len(places.facts) <= 9_000
    assert len({(fact.relation, fact.subject) for fact in places.facts}) == len(places.facts)
    truth = {(fact.relation, fact.subject): fact.answer for fact in places.facts}
    assert truth["country", "Osaka"] == "Japan"
    assert truth["capital", "Peru"] == "Lima"
    assert truth["code", "Germany"] == "DEU"
    assert truth["state code", "Texas"] == "TX"


def test_one_pass_asks_every_fact_once_and_no_withheld_phrasing(places: World) -> None:
    stream = closed_documents(places, random.Random(0), held_out=False)
    seen: list[tuple[str, str]] = []
    while len(seen) < len(places.facts):
        seen += asked(next(stream).text)
    allowed = {
        (fact.question(phrasing), fact.answer): fact
        for fact in places.facts
        for phrasing in range(2)
        if phrasing != fact.held_out_phrasing()
    }
    assert len(seen) == len(places.facts)
    assert {allowed[pair].index for pair in seen} == set(range(len(places.facts)))

    withheld = closed_documents(places, random.Random(0), held_out=True)
    for document in islice(withheld, 20):
        assert not set(asked(document.text)) & set(allowed)


def test_open_book_answers_are_in_the_context(places: World) -> None:
    subjects = {fact.subject for fact in places.facts}
    invented = 0
    for document in islice(open_documents(places, random.Random(1)), 200):
        notes = dict(re.findall(r"Note: the (.*? of .*) is (.*)\.\n", document.text))
        questions = re.findall(r"Q: (.*)\? A: (.*)\n", document.text)
        assert dict(questions) == notes
        assert len(questions) == len(notes) >= 3
        invented += questions[0][0].split(" of ", 1)[1] not in subjects
    assert 60 < invented < 140


def test_fact_questions(places: World) -> None:
    rows = fact_questions(places, random.Random(2), num_closed=200, num_other=100)
    truth = {fact.question(p): (fact, p) for fact in places.facts for p in range(2)}
    for row in rows:
        if row["form"].startswith("closed"):
            fact, phrasing = truth[row["prompt"]]
            assert row["answer"] == f" {fact.answer}"
            assert (phrasing == fact.held_out_phrasing()) == (row["form"] == "closed, unseen phrasing")
        else:
            prompt = row["prompt"].splitlines()[-1]
            stated = prompt.removeprefix("Q: ").removesuffix("? A:")
            assert f"Note: the {stated} is{row['answer']}.\n" in row["prompt"]
    assert {row["form"] for row in rows} == {"closed", "closed, unseen phrasing", "open", "open, invented"}


def test_structured_records_parse_and_agree(places: World) -> None:
    country = {city.name: city.country for city in places.cities}
    for document in islice(structured_documents(places, random.Random(3)), 100):
        if document.form == "json lines":
            records = [json.loads(line) for line in document.text.splitlines()]
        elif document.form == "json":
            records = json.loads(document.text)
        else:
            records = list(csv.DictReader(io.StringIO(document.text)))
        assert records
        for record in records:
            if "total" in record:
                assert int(record["quantity"]) * int(record["price"]) == int(record["total"])
                assert record["sku"] == f"{record['item']}-{record['colour']}-{record['id']}"
            elif "country" in record:
                assert country[record["city"]] == record["country"]
