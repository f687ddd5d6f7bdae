"""A small question-answering corpus, written from tables: the same seed gives the same bytes, with no network.

A passage tells four to six facts about one or two made-up things of a kind (a museum, a river, a scientist ...), so
that a reader has to tell the two apart, the year of one event from that of another, and what "it" or "she" stands for.
Every answer is a span of its passage. Nothing in it is true.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_accel.errors import OptionError

Row = dict[str, Any]

# --- what values are made of ------------------------------------------------------------------------------------------

_FIRST_NAMES = {
    "she": (
        "Ada Agnes Alma Beatrix Carmen Clara Dagny Edith Elena Fatima Greta Hanna Ines Ingrid Irma Johanna Judith "
        "Katarina Leila Lucia Magda Marta Meera Mina Nadia Nora Olga Paula Petra Rosa Ruth Sabine Selma Sofia Tamar "
        "Tilda Ursula Vera Wanda Yuki Zora"
    ).split(),
    "he": (
        "Abel Albert Anders Boris Casper Cyril Dario Edgar Emil Felix Gaspar Gustav Hamid Henrik Hugo Ivan Jakob Jonas "
        "Karim Kenji Leon Lukas Marco Matteo Milan Nils Omar Oskar Otto Pavel Piotr Rafael Rolf Samuel Stefan Tariq "
        "Theo Tomas Victor Walter Yusuf"
    ).split(),
}
_LAST_NAMES = (
    "Abelard Almgren Amari Baptiste Barlow Bergman Bonetti Brandt Calder Castillo Cermak Dahl Delgado Drummond "
    "Eriksen Falk Ferrante Fischer Galloway Gruber Haddad Halloran Hartmann Holm Ibarra Iversen Jansson Kaplan Keller "
    "Kovac Laurent Lindqvist Lombardi Marchetti Mendes Moreau Nakamura Novak Okafor Orsini Palmer Pereira Quist "
    "Ramsey Reyes Rossi Sandoval Schubert Serrano Sorensen Strand Takeda Thorne Ulrich Varga Vogel Weaver Winther "
    "Yamada Zeller"
).split()
_PLACE_STARTS = (
    "Alder Ash Bar Birch Black Bram Brook Cald Clay Dun East Elm Fair Fern Glen Grim Hal Hart Hazel High Holm Kings "
    "Lang Linden Lock Marl Mill North Oak Pem Port Raven Red Rock Rose Sand Silver South Stan Storm Sut Thorn Wal "
    "West Whit Wind Wolf"
).split()
_PLACE_ENDS = (
    "berg borough bridge burg bury by cliff dale den field ford ham haven holt mere mouth ness port stead ton wick"
).split()
_COUNTRIES = (
    "Argentina Austria Belgium Bolivia Canada Chile Croatia Denmark Ecuador Egypt Estonia Finland Ghana Greece "
    "Hungary Iceland India Ireland Italy Japan Kenya Latvia Mexico Morocco Norway Peru Poland Portugal Romania "
    "Slovenia Spain Sweden Tunisia Turkey Uruguay Vietnam"
).split()
_MONTHS = "January February March April May June July August September October November December".split()
_SMALL_NUMBERS = "three four five six seven eight nine eleven twelve fourteen fifteen sixteen eighteen twenty".split()
_MATERIALS = (
    "granite",
    "limestone",
    "red brick",
    "steel",
    "oak",
    "sandstone",
    "reinforced concrete",
    "slate",
    "cast iron",
    "white marble",
    "basalt",
    "pine",
)
_SUBJECTS = (
    "glaciers",
    "honey bees",
    "sea ice",
    "volcanic ash",
    "rice farming",
    "migratory birds",
    "medieval maps",
    "bacteria in soil",
    "coral reefs",
    "sunspots",
    "river deltas",
    "tree rings",
    "meteorites",
    "whale songs",
    "fossil ferns",
    "earthquakes",
    "ocean currents",
    "the inner ear",
)
_CROPS = (
    "barley",
    "olives",
    "apples",
    "sugar beet",
    "tobacco",
    "wool",
    "hops",
    "salmon",
    "timber",
    "saffron",
    "flax",
    "grapes",
    "copper ore",
    "salt",
    "chestnuts",
    "mustard",
)
_PRODUCTS = (
    "bicycles",
    "sewing machines",
    "cameras",
    "paper bags",
    "pianos",
    "wristwatches",
    "fishing nets",
    "tractors",
    "typewriters",
    "roof tiles",
    "hearing aids",
    "kitchen scales",
    "sailing boats",
    "light bulbs",
    "garden tools",
    "ceramic tiles",
)
_ANIMALS = (
    "beetles",
    "small crabs",
    "earthworms",
    "pine seeds",
    "flying ants",
    "berries",
    "snails",
    "dragonflies",
    "mosses",
    "young fish",
    "acorns",
    "spiders",
    "grasshoppers",
    "river weeds",
)
_HABITATS = (
    "mountain lakes",
    "salt marshes",
    "birch forests",
    "dry grassland",
    "rocky shores",
    "peat bogs",
    "river banks",
    "sea caves",
    "old orchards",
    "reed beds",
    "sand dunes",
    "mangrove swamps",
)
_GENRES = (
    "string quartets",
    "folk dances",
    "film music",
    "baroque operas",
    "choral works",
    "tangos",
    "military marches",
    "jazz standards",
    "lullabies",
    "church music",
    "symphonies",
    "waltzes",
)
_THEMES = (
    "a lost brother",
    "a lighthouse keeper",
    "a stolen violin",
    "two rival bakers",
    "a long winter",
    "a deaf clockmaker",
    "a forged painting",
    "an abandoned mine",
    "a travelling circus",
    "a disputed will",
    "a blind sailor",
    "a village without children",
    "the last train home",
    "a secret garden",
)
_ADJECTIVES = (
    "Amber Blue Broken Crimson Distant Empty Frozen Golden Hidden Hollow Iron Paper Quiet Salt Second Silent".split()
)
_NOUNS = (
    "Bridge Clock Crown Garden Harbour Hour Lantern Letter Meadow Mirror Orchard Promise River Shore Tower Winter"
).split()
_STARS = (
    "Altair Aurora Boreas Callisto Corvus Cygnus Electra Halcyon Helios Icarus Kestrel "
    "Lyra Meridian Orion Pegasus Vesper"
).split()
_COLOURS = (
    "green and white,black and gold,sky blue,red and yellow,dark purple,orange,maroon,navy blue,pink and grey".split(
        ","
    )
)
_BIRDS = "heron finch warbler plover kestrel wren petrel thrush".split()
_BIRD_COATS = (
    "Ash-tailed Bronze-winged Copper-headed Grey-backed Ivory-throated Ochre-breasted Rust-capped Spotted-necked"
).split()


def _person(rng: random.Random) -> str:
    gender = rng.choice(("she", "he"))
    return f"{rng.choice(_FIRST_NAMES[gender])} {rng.choice(_LAST_NAMES)}"


def _place(rng: random.Random) -> str:
    return rng.choice(_PLACE_STARTS) + rng.choice(_PLACE_ENDS)


def _number(low: int, high: int, step: int = 1) -> Callable[[random.Random], str]:
    return lambda rng: f"{rng.randrange(low, high, step):,}"


def _one_of(values: Sequence[str]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(values)


# The kinds of value that a fact can have: name -> how one is drawn.
VALUES: dict[str, Callable[[random.Random], str]] = {
    "year": lambda rng: str(rng.randrange(1780, 2015)),
    "date": lambda rng: f"{rng.randrange(1, 29)} {rng.choice(_MONTHS)} {rng.randrange(1850, 2015)}",
    "recent date": lambda rng: f"{rng.randrange(1, 29)} {rng.choice(_MONTHS)} {rng.randrange(1965, 2020)}",
    "day": lambda rng: f"{rng.choice(_MONTHS)} {rng.randrange(1, 29)}",
    "month": _one_of(_MONTHS),
    "person": _person,
    "place": _place,
    "country": _one_of(_COUNTRIES),
    "few": _one_of(_SMALL_NUMBERS),
    "hundreds": _number(110, 990, 5),
    "thousands": _number(1100, 98000, 100),
    "metres": lambda rng: f"{rng.randrange(12, 950)} metres",
    "kilometres": lambda rng: f"{rng.randrange(14, 890)} kilometres",
    "kilograms": lambda rng: f"{rng.randrange(60, 4200, 10):,} kilograms",
    "grams": lambda rng: f"{rng.randrange(9, 900)} grams",
    "percent": lambda rng: f"{rng.randrange(6, 94)} percent",
    "money": lambda rng: f"{rng.randrange(2, 95)} million {rng.choice(('crowns', 'dollars', 'euros', 'pounds'))}",
    "hours": lambda rng: f"{rng.choice(_SMALL_NUMBERS)} {rng.choice(('hours', 'days', 'weeks', 'months'))}",
    "material": _one_of(_MATERIALS),
    "subject": _one_of(_SUBJECTS),
    "crop": _one_of(_CROPS),
    "product": _one_of(_PRODUCTS),
    "food": _one_of(_ANIMALS),
    "habitat": _one_of(_HABITATS),
    "genre": _one_of(_GENRES),
    "theme": _one_of(_THEMES),
    "colour": _one_of(_COLOURS),
    "university": lambda rng: f"the University of {_place(rng)}",
    "river": lambda rng: f"the {rng.choice(_PLACE_STARTS)} River",
}

# --- what is told and asked -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """One thing that can be said of a topic. `{S}` and `{s}` stand for the topic at the start of a sentence and within
    one, `{v}` for the value; `asks` want the value, `names` (there may be none) give the value and want the topic."""

    value: str
    says: tuple[str, ...]
    asks: tuple[str, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A kind of topic: how one is called, what stands for it afterwards, and its facts."""

    noun: str
    name: Callable[[random.Random], str]
    facts: tuple[Fact, ...]
    article: str = "the "
    pronoun: str = "it"


DOMAINS: tuple[Domain, ...] = (
    Domain(
        "museum",
        lambda rng: f"{_place(rng)} {rng.choice(('Museum', 'Gallery', 'Collection'))}",
        (
            Fact(
                "person",
                ("{S} was founded by {v}.", "The founder of {s} was {v}, a retired teacher."),
                ("Who founded {s}?", "Which person started {s}?"),
                ("Which museum was founded by {v}?",),
            ),
            Fact(
                "year",
                ("{S} first opened its doors in {v}.", "Visitors have been able to see {s} since {v}."),
                ("When did {s} open?", "In what year did {s} open its doors?"),
            ),
            Fact(
                "thousands",
                ("About {v} people visit {s} every year.", "{S} welcomes {v} visitors a year."),
                ("How many visitors does {s} have each year?", "How many people visit {s} annually?"),
            ),
            Fact(
                "subject",
                ("{S} is best known for an exhibition on {v}.", "Its largest hall is devoted to {v}."),
                ("What is the best known exhibition of {s} about?", "What topic fills the largest hall of {s}?"),
            ),
            Fact(
                "material",
                ("The building that houses {s} is made of {v}.", "{S} stands in a former warehouse of {v}."),
                ("What is the building of {s} made of?", "Which material was used for the home of {s}?"),
            ),
            Fact(
                "money",
                ("{S} was enlarged at a cost of {v}.", "A new wing of {s} cost {v}."),
                ("How much did the enlargement of {s} cost?", "What was the price of the new wing of {s}?"),
            ),
        ),
    ),
    Domain(
        "river",
        lambda rng: f"{rng.choice(_PLACE_STARTS)}{rng.choice(('water', 'beck', 'burn', 'flow'))} River",
        (
            Fact(
                "kilometres",
                ("{S} is {v} long.", "From source to mouth {s} measures {v}."),
                ("How long is {s}?", "What is the length of {s}?"),
            ),
            Fact(
                "country",
                ("{S} rises in the hills of {v}.", "The spring that feeds {s} lies in {v}."),
                ("In which country does {s} rise?", "Where is the source of {s}?"),
                ("Which river begins in {v}?",),
            ),
            Fact(
                "place",
                ("{S} reaches the sea near {v}.", "At {v} {s} flows into the sea."),
                ("Near which town does {s} reach the sea?", "Where does {s} flow into the sea?"),
                ("Which river meets the sea at {v}?",),
            ),
            Fact(
                "few",
                ("There are {v} dams on {s}.", "Engineers built {v} dams across {s}."),
                ("How many dams does {s} have?", "How many dams were built on {s}?"),
            ),
            Fact(
                "month",
                ("{S} usually floods in {v}.", "The highest water on {s} comes in {v}."),
                ("In which month does {s} usually flood?", "When is the water of {s} highest?"),
            ),
            Fact(
                "year",
                ("A flood of {s} destroyed a railway in {v}.", "In {v} {s} burst its banks."),
                ("When did {s} burst its banks?", "In what year did a flood of {s} cause damage?"),
            ),
        ),
    ),
    Domain(
        "scientist",
        lambda rng: "",
        (
            Fact(
                "place",
                ("{S} was born in {v}.", "{S} came from {v}, where the family kept a shop."),
                ("Where was {s} born?", "What was the birthplace of {s}?"),
                ("Who was born in {v}?",),
            ),
            Fact(
                "subject",
                ("{S} spent a lifetime studying {v}.", "{S} wrote a famous book on {v}."),
                ("What did {s} study?", "What was the research of {s} about?"),
                ("Who was an expert on {v}?", "Which scientist wrote about {v}?"),
            ),
            Fact(
                "university",
                ("{S} taught at {v}.", "{S} became a professor at {v}."),
                ("Where did {s} teach?", "At which university was {s} a professor?"),
                ("Who taught at {v}?",),
            ),
            Fact(
                "year",
                ("{S} received a gold medal in {v}.", "In {v} {s} was awarded a medal."),
                ("When was {s} given a medal?", "In which year did {s} receive a medal?"),
            ),
            Fact(
                "person",
                ("{S} married {v}, a painter.", "{S} shared a laboratory and a home with {v}."),
                ("Whom did {s} marry?", "With whom did {s} share a home?"),
            ),
            Fact(
                "few",
                ("{S} made {v} expeditions to the Arctic.", "{S} led {v} expeditions abroad."),
                ("How many expeditions did {s} make?", "How many times did {s} lead an expedition?"),
            ),
        ),
        article="",
    ),
    Domain(
        "novel",
        lambda rng: f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}",
        (
            Fact(
                "person",
                ("{S} was written by {v}.", "{v} wrote {s} in a rented room."),
                ("Who wrote {s}?", "Who is the author of {s}?"),
                ("Which novel was written by {v}?", "What is the title of the book by {v}?"),
            ),
            Fact(
                "year",
                ("{S} was published in {v}.", "Readers could buy {s} from {v} onwards."),
                ("When was {s} published?", "In which year did {s} come out?"),
            ),
            Fact(
                "theme",
                ("{S} tells the story of {v}.", "At the heart of {s} is {v}."),
                ("What is {s} about?", "Who or what is at the heart of {s}?"),
                ("Which novel is about {v}?",),
            ),
            Fact(
                "place",
                ("The story of {s} takes place in {v}.", "{S} is set in {v}."),
                ("Where is {s} set?", "In which town does {s} take place?"),
            ),
            Fact(
                "few",
                ("{S} has been translated into {v} languages.", "There are editions of {s} in {v} languages."),
                ("Into how many languages has {s} been translated?", "How many languages can {s} be read in?"),
            ),
            Fact(
                "thousands",
                ("{S} sold {v} copies in a year.", "Within a year {v} copies of {s} had been sold."),
                ("How many copies of {s} were sold?", "What number of copies did {s} sell in a year?"),
            ),
        ),
        article="",
    ),
    Domain(
        "bridge",
        lambda rng: f"{_place(rng)} {rng.choice(('Bridge', 'Viaduct', 'Crossing'))}",
        (
            Fact(
                "metres",
                ("{S} is {v} long.", "The length of {s} is {v}."),
                ("How long is {s}?", "What is the length of {s}?"),
            ),
            Fact(
                "river",
                ("{S} spans {v}.", "{S} carries a road over {v}."),
                ("Which river does {s} cross?", "What does {s} span?"),
                ("Which bridge crosses {v}?",),
            ),
            Fact(
                "person",
                ("{S} was designed by {v}.", "The engineer {v} drew the plans for {s}."),
                ("Who designed {s}?", "Who drew the plans for {s}?"),
                ("Which bridge did {v} design?",),
            ),
            Fact(
                "year",
                ("{S} was completed in {v}.", "Work on {s} ended in {v}."),
                ("When was {s} completed?", "In what year was {s} finished?"),
            ),
            Fact(
                "money",
                ("{S} cost {v} to build.", "The town paid {v} for {s}."),
                ("How much did {s} cost?", "What did the town pay for {s}?"),
            ),
            Fact(
                "material",
                ("{S} is built of {v}.", "The pillars of {s} are of {v}."),
                ("What is {s} built of?", "Of which material are the pillars of {s}?"),
            ),
        ),
    ),
    Domain(
        "football club",
        lambda rng: f"{_place(rng)} {rng.choice(('United', 'Rovers', 'Athletic', 'Wanderers'))}",
        (
            Fact(
                "year",
                ("{S} was formed in {v}.", "A group of dock workers formed {s} in {v}."),
                ("When was {s} formed?", "In what year did {s} come into being?"),
            ),
            Fact(
                "colour",
                ("{S} plays in {v}.", "The shirts of {s} are {v}."),
                ("What are the colours of {s}?", "In which colours does {s} play?"),
                ("Which club plays in {v}?",),
            ),
            Fact(
                "thousands",
                ("The ground of {s} holds {v} people.", "{S} plays before {v} people when its ground is full."),
                ("How many people does the ground of {s} hold?", "What is the capacity of the ground of {s}?"),
            ),
            Fact(
                "person",
                ("{S} is coached by {v}.", "{v} has trained {s} for a decade."),
                ("Who coaches {s}?", "Who is the coach of {s}?"),
                ("Which club is coached by {v}?",),
            ),
            Fact(
                "few",
                ("{S} has won the national cup {v} times.", "There are {v} cups in the cabinet of {s}."),
                ("How many cups has {s} won?", "How often has {s} won the cup?"),
            ),
            Fact(
                "hundreds",
                ("{S} played {v} matches away from home.", "{S} has played {v} matches in the first division."),
                ("How many matches has {s} played?", "What number of matches did {s} play?"),
            ),
        ),
        article="",
    ),
    Domain(
        "company",
        lambda rng: f"{rng.choice(_LAST_NAMES)} {rng.choice(('Works', 'Brothers', 'Industries', 'and Sons'))}",
        (
            Fact(
                "product",
                ("{S} makes {v}.", "{S} earned its name with {v}."),
                ("What does {s} make?", "What are the products of {s}?"),
                ("Which company makes {v}?",),
            ),
            Fact(
                "place",
                ("The headquarters of {s} are in {v}.", "{S} has its main office in {v}."),
                ("Where are the headquarters of {s}?", "In which town is the main office of {s}?"),
                ("Which company is based in {v}?",),
            ),
            Fact(
                "thousands",
                ("{S} employs {v} people.", "Some {v} people work for {s}."),
                ("How many people does {s} employ?", "How many workers does {s} have?"),
            ),
            Fact(
                "person",
                ("{S} is led by {v}.", "The head of {s} is {v}."),
                ("Who leads {s}?", "Who is the head of {s}?"),
                ("Which company is led by {v}?",),
            ),
            Fact(
                "percent",
                ("{S} sells {v} of its goods abroad.", "Exports make up {v} of the sales of {s}."),
                ("What share of its goods does {s} sell abroad?", "How much of the sales of {s} are exports?"),
            ),
            Fact(
                "date",
                ("{S} was registered on {v}.", "The papers that created {s} were signed on {v}."),
                ("On which date was {s} registered?", "When were the papers of {s} signed?"),
            ),
        ),
        article="",
    ),
    Domain(
        "festival",
        lambda rng: f"{_place(rng)} {rng.choice(('Festival', 'Fair', 'Carnival'))}",
        (
            Fact(
                "day",
                ("{S} begins on {v}.", "Every year {s} opens on {v}."),
                ("On which day does {s} begin?", "When does {s} open every year?"),
            ),
            Fact(
                "hours",
                ("{S} lasts {v}.", "It takes {v} until {s} is over."),
                ("How long does {s} last?", "What is the duration of {s}?"),
            ),
            Fact(
                "genre",
                ("{S} is devoted to {v}.", "Most concerts at {s} consist of {v}."),
                ("What kind of music is heard at {s}?", "To what is {s} devoted?"),
                ("Which festival is devoted to {v}?",),
            ),
            Fact(
                "thousands",
                ("Last year {v} guests came to {s}.", "{S} sold {v} tickets last year."),
                ("How many guests came to {s} last year?", "How many tickets did {s} sell?"),
            ),
            Fact(
                "person",
                ("{S} is organised by {v}.", "The idea for {s} came from {v}."),
                ("Who organises {s}?", "Who had the idea for {s}?"),
                ("Which festival is the work of {v}?",),
            ),
            Fact(
                "country",
                ("Many guests of {s} travel from {v}.", "{S} has a partner event in {v}."),
                ("From which country do many guests of {s} come?", "With which country is {s} linked?"),
            ),
        ),
    ),
    Domain(
        "spacecraft",
        lambda rng: f"{rng.choice(_STARS)} {rng.randrange(2, 30)}",
        (
            Fact(
                "recent date",
                ("{S} was launched on {v}.", "{S} left the Earth on {v}."),
                ("When was {s} launched?", "On what date did {s} leave the Earth?"),
                ("Which spacecraft was launched on {v}?",),
            ),
            Fact(
                "kilograms",
                ("{S} has a mass of {v}.", "With its fuel {s} weighs {v}."),
                ("What is the mass of {s}?", "How heavy is {s}?"),
            ),
            Fact(
                "country",
                ("{S} was built in {v}.", "Factories in {v} supplied the parts of {s}."),
                ("Where was {s} built?", "Which country supplied the parts of {s}?"),
                ("Which spacecraft comes from {v}?",),
            ),
            Fact(
                "few",
                ("{S} carries {v} instruments.", "On board {s} are {v} instruments."),
                ("How many instruments does {s} carry?", "How many instruments are on board {s}?"),
            ),
            Fact(
                "hours",
                ("{S} circled the Moon for {v}.", "After {v} {s} fell silent."),
                ("How long did {s} work near the Moon?", "After how much time did {s} fall silent?"),
            ),
            Fact(
                "money",
                ("{S} had a budget of {v}.", "Taxpayers spent {v} on {s}."),
                ("What was the budget of {s}?", "How much money was spent on {s}?"),
            ),
        ),
        article="",
    ),
    Domain(
        "composer",
        lambda rng: "",
        (
            Fact(
                "genre",
                ("{S} is remembered for {v}.", "{S} mostly wrote {v}."),
                ("For what is {s} remembered?", "What did {s} mostly write?"),
                ("Who is remembered for {v}?", "Which composer wrote {v}?"),
            ),
            Fact(
                "date",
                ("{S} died on {v}.", "The last concert of {s} was given on {v}."),
                ("On which date did the career of {s} end?", "When was the end of {s}?"),
            ),
            Fact(
                "person",
                ("{S} took lessons from {v}.", "{S} was a pupil of {v}."),
                ("Who taught {s}?", "From whom did {s} take lessons?"),
                ("Who was a pupil of {v}?",),
            ),
            Fact(
                "place",
                ("{S} directed the opera of {v}.", "{S} played the organ in {v}."),
                ("In which town did {s} work?", "Where did {s} have a post?"),
            ),
            Fact(
                "hundreds",
                ("{S} left {v} works.", "A catalogue lists {v} pieces by {s}."),
                ("How many works did {s} leave?", "How many pieces by {s} are known?"),
            ),
            Fact(
                "country",
                ("{S} moved to {v} as a child.", "{S} spent the war in {v}."),
                ("To which country did {s} go?", "In which country did {s} spend time?"),
                ("Who lived in {v}?",),
            ),
        ),
        article="",
    ),
    Domain(
        "village",
        lambda rng: _place(rng),
        (
            Fact(
                "hundreds",
                ("{S} has {v} inhabitants.", "At the last count {v} people lived in {s}."),
                ("How many inhabitants does {s} have?", "What is the population of {s}?"),
            ),
            Fact(
                "crop",
                ("{S} lives on {v}.", "Most families of {s} trade in {v}."),
                ("What does {s} live on?", "In what do the families of {s} trade?"),
                ("Which village is known for {v}?",),
            ),
            Fact(
                "metres",
                ("{S} lies {v} above the sea.", "The market square of {s} is at a height of {v}."),
                ("How high does {s} lie?", "At what height is {s}?"),
            ),
            Fact(
                "person",
                ("The mayor of {s} is {v}.", "{S} elected {v} as its mayor."),
                ("Who is the mayor of {s}?", "Whom did {s} elect as mayor?"),
                ("Of which village is {v} the mayor?",),
            ),
            Fact(
                "year",
                ("{S} is first mentioned in a letter of {v}.", "The charter of {s} dates from {v}."),
                ("When was {s} first recorded?", "From what year is the oldest document of {s}?"),
            ),
            Fact(
                "kilometres",
                ("It is {v} from {s} to the nearest railway station.", "{S} is {v} away from the railway."),
                ("How far is it from {s} to a train?", "At what distance from the railway is {s}?"),
            ),
        ),
        article="",
    ),
    Domain(
        "bird",
        lambda rng: f"{rng.choice(_BIRD_COATS)} {rng.choice(_BIRDS)}",
        (
            Fact(
                "habitat",
                ("{S} lives in {v}.", "The nests of {s} are found in {v}."),
                ("Where does {s} live?", "In what surroundings does {s} nest?"),
                ("Which bird lives in {v}?",),
            ),
            Fact(
                "food",
                ("{S} feeds on {v}.", "{S} eats hardly anything but {v}."),
                ("What does {s} eat?", "On what does {s} feed?"),
                ("Which bird eats {v}?",),
            ),
            Fact(
                "grams",
                ("An adult of {s} weighs {v}.", "{S} reaches a weight of {v}."),
                ("How much does {s} weigh?", "What is the weight of {s}?"),
            ),
            Fact(
                "country",
                ("In winter {s} migrates to {v}.", "{S} spends the cold season in {v}."),
                ("Where does {s} spend the winter?", "To which country does {s} migrate?"),
                ("Which bird spends the winter in {v}?",),
            ),
            Fact(
                "person",
                ("{S} was first described by {v}.", "The naturalist {v} discovered {s}."),
                ("Who discovered {s}?", "Who first described {s}?"),
                ("Which bird was discovered by {v}?",),
            ),
            Fact(
                "percent",
                ("The number of {s} has fallen by {v}.", "{S} has lost {v} of its range."),
                ("By how much has {s} declined?", "What share did {s} lose?"),
            ),
        ),
    ),
    Domain(
        "castle",
        lambda rng: f"{_place(rng)} {rng.choice(('Castle', 'Fortress', 'Abbey'))}",
        (
            Fact(
                "year",
                ("{S} burned down in {v}.", "A fire in {v} ruined {s}."),
                ("When did {s} burn down?", "In what year was {s} ruined?"),
            ),
            Fact(
                "person",
                ("{S} was restored by {v}.", "The architect {v} rebuilt {s}."),
                ("Who restored {s}?", "Which architect rebuilt {s}?"),
                ("Which castle was restored by {v}?",),
            ),
            Fact(
                "few",
                ("{S} has {v} towers.", "The walls of {s} connect {v} towers."),
                ("How many towers does {s} have?", "What number of towers belongs to {s}?"),
            ),
            Fact(
                "river",
                ("{S} looks down on {v}.", "From {s} one can see {v}."),
                ("On which river does {s} look down?", "What river can be seen from {s}?"),
                ("Which castle stands above {v}?",),
            ),
            Fact(
                "material",
                ("The walls of {s} are made of {v}.", "{S} was built of {v}."),
                ("What are the walls of {s} made of?", "Of what was {s} built?"),
            ),
            Fact(
                "hours",
                ("{S} withstood a siege of {v}.", "An army lay before {s} for {v}."),
                ("How long was the siege of {s}?", "For how long did {s} resist?"),
            ),
        ),
    ),
    Domain(
        "railway",
        lambda rng: f"{_place(rng)} {rng.choice(('Line', 'Railway'))}",
        (
            Fact(
                "place",
                ("{S} ends at {v}.", "The last stop of {s} is {v}."),
                ("Where does {s} end?", "What is the last stop of {s}?"),
                ("Which railway ends at {v}?",),
            ),
            Fact(
                "few",
                ("{S} passes through {v} tunnels.", "There are {v} tunnels along {s}."),
                ("How many tunnels does {s} have?", "Through how many tunnels does {s} pass?"),
            ),
            Fact(
                "date",
                ("The first train ran on {s} on {v}.", "{S} was opened on {v}."),
                ("On which date was {s} opened?", "When did the first train run on {s}?"),
            ),
            Fact(
                "crop",
                ("{S} was built to carry {v}.", "For decades {s} earned its money with {v}."),
                ("What was {s} built to carry?", "What goods did {s} transport?"),
                ("Which railway carried {v}?",),
            ),
            Fact(
                "kilometres",
                ("{S} has a length of {v}.", "The track of {s} runs for {v}."),
                ("How long is {s}?", "What is the length of {s}?"),
            ),
            Fact(
                "thousands",
                ("Each day {v} passengers use {s}.", "{S} carries {v} passengers a day."),
                ("How many passengers use {s}?", "How many people travel on {s} each day?"),
            ),
        ),
    ),
)

# Sentences that tell nothing that is asked for.
_FILLERS = (
    "Opinions about this differ.",
    "Local newspapers still write about it from time to time.",
    "Older sources are not always reliable.",
    "Few records from the early years have survived.",
    "A small plaque recalls these events.",
    "This came as a surprise to many people at the time.",
    "School classes often choose it as a subject.",
    "More details can be found in the town archive.",
)
_TURNS = ("By contrast, ", "Meanwhile, ", "On the other hand, ", "Elsewhere, ")


# --- how a passage comes about ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Topic:
    domain: Domain
    name: str
    pronoun: str

    @property
    def full(self) -> str:
        """The name as it stands within a sentence."""
        return self.domain.article + self.name


@dataclass(frozen=True)
class _Told:
    """A fact in a passage: whose it is, its value, and where the value stands (code points)."""

    topic: _Topic
    fact: Fact
    value: str
    value_start: int


@dataclass
class _Passage:
    text: str = ""
    told: list[_Told] = field(default_factory=list)

    def add(self, sentence: str) -> None:
        self.text += (" " if self.text else "") + sentence


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _draw_topic(rng: random.Random, domain: Domain) -> _Topic:
    name = domain.name(rng)
    if name:
        return _Topic(domain, name, domain.pronoun)
    pronoun = rng.choice(("she", "he"))
    return _Topic(domain, f"{rng.choice(_FIRST_NAMES[pronoun])} {rng.choice(_LAST_NAMES)}", pronoun)


def _mention(rng: random.Random, topic: _Topic, template: str, known: bool) -> str:
    """How the topic is called in a sentence; `known` when the sentence before was about it too."""
    if not known or rng.random() < 0.4:
        return topic.full
    if template.startswith("{S}") and rng.random() < 0.6:
        return topic.pronoun
    return f"the {topic.domain.noun}"


def _tell(rng: random.Random, passage: _Passage, topic: _Topic, fact: Fact, value: str, known: bool, turn: str) -> None:
    template = rng.choice(fact.says)
    mention = _mention(rng, topic, template, known)
    before, after = (
        part.replace("{S}", mention if turn else _upper_first(mention)).replace("{s}", mention)
        for part in template.split("{v}")
    )
    # A sentence may open with its value or with an article; behind a turn of phrase only names keep their capital.
    if turn and not template.startswith(("{S}", "{v}")):
        before = before[:1].lower() + before[1:]
    lead = turn + before
    passage.add(lead + value + after)
    start = len(passage.text) - len(after) - len(value)
    passage.told.append(_Told(topic, fact, value, start))


def _write_passage(rng: random.Random) -> _Passage:
    """Three or four facts about one topic and, mostly, one to three about another of its kind that share some."""
    domain = rng.choice(DOMAINS)
    first, second = _draw_topic(rng, domain), _draw_topic(rng, domain)
    while second.name == first.name:
        second = _draw_topic(rng, domain)
    facts = rng.sample(domain.facts, 4)
    used = {first.name, second.name}

    def value_of(fact: Fact) -> str:
        # A value that stood for two things would make a question with two right answers.
        while True:
            value = VALUES[fact.value](rng)
            if not any(value in other or other in value for other in used):
                used.add(value)
                return value

    passage = _Passage()
    first_facts = facts[: rng.choice((3, 4))]
    # The sentence that opens a passage has to name its topic.
    first_facts.sort(key=lambda fact: not all("{S}" in said or "{s}" in said for said in fact.says))
    for position, fact in enumerate(first_facts):
        _tell(rng, passage, first, fact, value_of(fact), known=position > 0, turn="")
    if rng.random() < 0.4:
        passage.add(rng.choice(_FILLERS))
    if rng.random() < 0.85:
        named = [fact for fact in facts if all("{S}" in said or "{s}" in said for said in fact.says)]
        for position, fact in enumerate(rng.sample(named, rng.choice((1, 2, 3)))):
            turn = rng.choice(_TURNS) if position == 0 else ""
            _tell(rng, passage, second, fact, value_of(fact), known=position > 0, turn=turn)
    return passage


def _questions(rng: random.Random, passage: _Passage) -> Iterator[tuple[str, str, int]]:
    """Question, answer and the answer's start for each fact that the passage tells: of the value or, now and then, of
    the topic that the value belongs to."""
    for told in passage.told:
        if told.fact.names and rng.random() < 0.3:
            question = rng.choice(told.fact.names).replace("{v}", told.value)
            # The mention nearest to the fact, before it if there is one.
            start = passage.text.rfind(told.topic.name, 0, told.value_start)
            if start < 0:
                start = passage.text.find(told.topic.name)
            yield question, told.topic.name, start
        else:
            yield _upper_first(rng.choice(told.fact.asks).replace("{s}", told.topic.full)), told.value, told.value_start


def _rows(rng: random.Random, prefix: str, count: int, seen: set[str]) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < count:
        passage = _write_passage(rng)
        if passage.text in seen:
            continue
        seen.add(passage.text)
        for question, answer, start in _questions(rng, passage):
            rows.append(
                {
                    "id": f"{prefix}-{len(rows):05d}",
                    "title": passage.told[0].topic.name,
                    "context": passage.text,
                    "question": question,
                    "answers": {"text": [answer], "answer_start": [start]},
                }
            )
    return rows[:count]


def make_corpus(train_questions: int, validation_questions: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Training and validation rows in SQuAD's flat form: `id`, `title`, `context`, `question`, `answers` (`text` and
    `answer_start`, one each). No passage is in both. Raises OptionError for a count below 1."""
    for name, count in (("train_questions", train_questions), ("validation_questions", validation_questions)):
        if count < 1:
            raise OptionError(f"{name} must be 1 or more, got {count}")
    rng = random.Random(seed)
    seen: set[str] = set()
    # Validation first: asking for more training questions leaves the questions that scores are measured on as they are.
    validation = _rows(rng, "demo-validation", validation_questions, seen)
    return _rows(rng, "demo-train", train_questions, seen), validation


def write_corpus(folder: Path, train_questions: int, validation_questions: int, seed: int = 0) -> tuple[Path, Path]:
    """Writes `train.json` and `validation.json` (each `{"data": [rows]}`) under `folder` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.json", folder / "validation.json"
    for path, rows in zip(paths, make_corpus(train_questions, validation_questions, seed), strict=True):
        # Under another name first: a file that is there is whole.
        unfinished = path.with_suffix(".json.part")
        unfinished.write_text(json.dumps({"data": rows}, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    return paths
