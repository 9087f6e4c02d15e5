"""Grade-school word problems in GSM8K's own format, made from a seed: the demo's corpus, without a download.

A row is `question`, `answer` (worked steps with GSM8K's calculator notes `<<3*4=12>>`, then `#### 12`), `template`
and `difficulty`. The last two are labels: a partition by either gives clients with different data.

A template is data: wordings, a pool of values for each placeholder, and steps such as `[left = total-sold]`, which
becomes `48-20 = <<48-20=28>>28`. It states no constraints: a draw that names one person twice, divides with a remainder
or reaches a number below two (one would need the singular) is simply not used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

Row = dict[str, str]

DIFFICULTIES = ("easy", "medium", "hard")

_NOTE = re.compile(r"\[(\w+) = ([\w+*/-]+)\]")
_OPERATION = re.compile(r"(\w+)([+*/-])(\w+)")


@dataclass(frozen=True)
class Template:
    """One kind of problem. `steps` are the lines of the answer, each with exactly one note `[result = x+y]`."""

    name: str
    wordings: tuple[str, ...]
    pools: Mapping[str, Sequence[str | int]]
    steps: tuple[str, ...]

    def __post_init__(self) -> None:
        for wording in self.wordings:
            for key in self.pools:
                if f"{{{key}}}" not in wording:  # two draws would give the same question
                    raise ValueError(f"template {self.name!r}: {{{key}}} is drawn but does not occur in {wording!r}")

    @property
    def difficulty(self) -> str:
        """One step is easy, two are medium, three or more hard."""
        return DIFFICULTIES[min(len(self.steps), len(DIFFICULTIES)) - 1]

    @property
    def draws(self) -> int:
        """How many ways the placeholders can be filled; unusable draws count too, so this is an upper bound."""
        return math.prod(map(len, self.pools.values()), start=len(self.wordings))

    def rows(self, rng: Random) -> Iterator[Row]:
        """Every question this template can ask, each once, in random order."""
        for index in _shuffled(self.draws, rng):
            index, wording = divmod(index, len(self.wordings))
            values: dict[str, str | int] = {}
            for key, pool in self.pools.items():
                index, place = divmod(index, len(pool))
                values[key] = pool[place]
            answer = self._solve(values)
            if answer is not None:
                question = self.wordings[wording].format_map(values)
                yield {"question": question, "answer": answer, "template": self.name, "difficulty": self.difficulty}

    def _solve(self, values: Mapping[str, str | int]) -> str | None:
        """The worked answer, or None where the draw makes no sense."""
        words = [value for value in values.values() if isinstance(value, str)]
        if len(set(words)) < len(words):
            return None
        known = {key: value for key, value in values.items() if isinstance(value, int)}
        lines, result = [], 0
        for step in self.steps:
            note = _NOTE.search(step)
            operation = note and _OPERATION.fullmatch(note[2])
            if not note or not operation:
                raise ValueError(f"template {self.name!r}: a step needs one note like [sum = a+b], got {step!r}")
            left, symbol, right = operation.groups()
            x, y = (int(term) if term.isdecimal() else known[term] for term in (left, right))
            if symbol == "/" and x % y:
                return None
            result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[symbol]
            if result < 2:
                return None
            known[note[1]] = result
            shown = f"{x}{symbol}{y}"
            line = step[: note.start()] + f"{shown} = <<{shown}={result}>>{result}" + step[note.end() :]
            lines.append(line.format_map(values))
        return "\n".join([*lines, f"#### {result}"])


def generate(
    rows: int,
    seed: int,
    difficulty: str | Sequence[str] = DIFFICULTIES,
    templates: Sequence[Template] | None = None,
) -> list[Row]:
    """`rows` distinct problems, spread evenly over `difficulty` and, within each, over its templates.

    Repeats are weights: `("easy", "easy", "medium")` is two thirds easy. The result for fewer rows is the beginning
    of the result for more.

    Raises ValueError for an unknown difficulty, or for more rows than there are distinct questions.
    """
    if rows < 0:
        raise ValueError(f"rows is {rows}; it must be 0 or more")
    mix = (difficulty,) if isinstance(difficulty, str) else tuple(difficulty)
    chosen = TEMPLATES if templates is None else templates
    decks = {level: [t for t in chosen if t.difficulty == level] for level in mix}
    for level in mix or ("",):
        if not decks.get(level):
            raise ValueError(f"no templates of difficulty {level!r}; choose from {', '.join(DIFFICULTIES)}")
    for level, deck in decks.items():
        asked, most = rows // len(mix) * mix.count(level), sum(template.draws for template in deck)
        if asked > most:
            raise ValueError(f"{asked} distinct {level} questions are asked for, but there are at most {most}")
    # A generator per template, seeded by name: a new template leaves the questions of the others as they are.
    streams = {t.name: t.rows(Random(f"{seed}/{t.name}")) for deck in decks.values() for t in deck}
    deals = {level: _deal(deck, streams, Random(f"{seed}/{level}")) for level, deck in decks.items()}
    found: list[Row] = []
    while len(found) < rows:
        level = mix[len(found) % len(mix)]
        row = next(deals[level], None)
        if row is None:
            raise ValueError(f"only {len(found)} distinct questions for {rows} rows: the {level} templates are used up")
        found.append(row)
    return found


def split(
    train: int,
    test: int,
    seed: int,
    difficulty: str | Sequence[str] = DIFFICULTIES,
    templates: Sequence[Template] | None = None,
) -> tuple[list[Row], list[Row]]:
    """`(train rows, test rows)` without a common question. The test rows come first, so more training data
    leaves the test set as it was."""
    if train < 0 or test < 0:
        raise ValueError(f"train is {train} and test is {test}; both must be 0 or more")
    found = generate(train + test, seed, difficulty, templates)
    return found[test:], found[:test]


def _deal(deck: Sequence[Template], streams: Mapping[str, Iterator[Row]], rng: Random) -> Iterator[Row]:
    """One row of each template, in a new order each time round, until no template has one left."""
    dealt = True
    while dealt:
        dealt = False
        for template in rng.sample(deck, len(deck)):
            row = next(streams[template.name], None)
            if row is not None:
                dealt = True
                yield row


def _shuffled(size: int, rng: Random) -> Iterator[int]:
    """0 .. size-1 in random order: Fisher-Yates that remembers only the places it has swapped."""
    moved: dict[int, int] = {}
    for first in range(size):
        chosen = rng.randrange(first, size)
        here = moved.get(first, first)
        yield moved.get(chosen, chosen)
        moved[chosen] = here
        moved.pop(first, None)


PEOPLE = (
    "Amara", "Bruno", "Carla", "Dmitri", "Elif", "Farah", "Goran", "Hana", "Ines", "Jonas", "Kofi", "Lena",
    "Mateo", "Nadia", "Oskar", "Priya", "Quinn", "Rosa", "Samir", "Tala", "Uma", "Viktor", "Wen", "Yusuf",
)  # fmt: skip
FRUIT = ("apples", "pears", "plums", "figs", "lemons", "oranges", "peaches", "mangoes", "cherries", "berries")
TREATS = ("cookies", "muffins", "pretzels", "dumplings", "pancakes", "waffles", "crackers", "biscuits", "buns")
TOYS = ("marbles", "stickers", "stamps", "shells", "beads", "buttons", "postcards", "dominoes", "coins", "badges")
SCHOOL = ("pencils", "notebooks", "erasers", "rulers", "markers", "folders", "brushes", "crayons", "pens")
PLANTS = ("tulips", "carrots", "onions", "roses", "cabbages", "sunflowers", "radishes", "daisies", "leeks")
BOXES = ("boxes", "bags", "packs", "jars", "cartons", "crates", "tins")
SMALL, LARGE = range(2, 10), range(10, 30)

TEMPLATES = (
    Template(
        "gather",
        (
            (
                "{name} picks {a} {item} in the morning and {b} {item} in the afternoon. "
                "How many {item} does {name} pick in total?"
            ),
            (
                "There are {a} {item} in a basket. {name} puts {b} more {item} into it. "
                "How many {item} are in the basket now?"
            ),
        ),
        {"name": PEOPLE, "item": FRUIT, "a": range(3, 20), "b": SMALL},
        ("There are [total = a+b] {item}.",),
    ),
    Template(
        "give",
        (
            "{name} has {a} {item} and gives {b} of them to {friend}. How many {item} does {name} have left?",
            "{name} owned {a} {item} until {friend} borrowed {b} of them. How many {item} are still with {name}?",
        ),
        {"name": PEOPLE, "friend": PEOPLE, "item": TOYS, "a": range(8, 20), "b": SMALL},
        ("{name} has [left = a-b] {item} left.",),
    ),
    Template(
        "packs",
        (
            "{name} buys {a} {box} of {item}. There are {b} {item} in each. How many {item} does {name} buy?",
            "A shop sends {name} {a} {box} with {b} {item} in every one. How many {item} arrive?",
        ),
        {"name": PEOPLE, "box": BOXES, "item": SCHOOL, "a": SMALL, "b": SMALL},
        ("That is [total = a*b] {item}.",),
    ),
    Template(
        "share",
        (
            "{name} shares {a} {item} equally among {b} friends. How many {item} does each friend get?",
            (
                "At a picnic, {a} {item} are put on {b} plates by {name}, the same number on each. "
                "How many {item} are on one plate?"
            ),
        ),
        {"name": PEOPLE, "item": TREATS, "a": range(6, 41), "b": range(2, 8)},
        ("Each gets [each = a/b] {item}.",),
    ),
    Template(
        "price",
        (
            "In a market {item} cost ${b} each. How many dollars does {name} pay for {a} {item}?",
            "{name} needs {a} {item}, and the price of each is ${b}. How many dollars is that altogether?",
        ),
        {"name": PEOPLE, "item": SCHOOL, "a": SMALL, "b": SMALL},
        ("{name} pays [cost = a*b] dollars.",),
    ),
    Template(
        "older",
        (
            "{name} is {a} years old. {friend} is {b} years older than {name}. How old is {friend}?",
            "{friend} was born {b} years before {name}, who is now {a}. How many years old is {friend}?",
        ),
        {"name": PEOPLE, "friend": PEOPLE, "a": range(4, 20), "b": SMALL},
        ("{friend} is [age = a+b] years old.",),
    ),
    Template(
        "compare",
        (
            (
                "On Saturday {name} read {a} pages and {friend} read {b} pages. "
                "How many more pages did {name} read than {friend}?"
            ),
            (
                "{name}'s book has {a} chapters. {friend}'s book has only {b}. "
                "How many fewer chapters has {friend}'s book?"
            ),
        ),
        {"name": PEOPLE, "friend": PEOPLE, "a": range(8, 20), "b": SMALL},
        ("The difference is [more = a-b].",),
    ),
    Template(
        "daily",
        (
            "{name} walks {a} kilometers every day. How many kilometers does {name} walk in {b} days?",
            "Each day {name} practices the piano for {a} minutes. How many minutes is that after {b} days?",
        ),
        {"name": PEOPLE, "a": range(2, 13), "b": SMALL},
        ("The total is [total = a*b].",),
    ),
    Template(
        "change",
        (
            "{name} buys {a} {item} for ${b} each and pays with ${c}. How many dollars does {name} get back?",
            "With ${c} in a purse, {name} pays for {a} {item} at ${b} apiece. How many dollars remain?",
        ),
        {"name": PEOPLE, "item": SCHOOL, "a": SMALL, "b": SMALL, "c": (20, 50, 100)},
        ("The {item} cost [cost = a*b] dollars.", "{name} has [left = c-cost] dollars left."),
    ),
    Template(
        "loose",
        (
            "{name} has {a} {box} with {b} {item} in each, and {c} loose {item}. How many {item} are there in all?",
            (
                "On a shelf stand {a} {box}, each with {b} {item}. {name} adds {c} single {item}. "
                "How many {item} are on the shelf?"
            ),
        ),
        {"name": PEOPLE, "box": BOXES, "item": TOYS, "a": SMALL, "b": SMALL, "c": SMALL},
        ("The {box} hold [packed = a*b] {item}.", "Altogether there are [total = packed+c] {item}."),
    ),
    Template(
        "leftovers",
        (
            (
                "{name} bakes {a} {item}, eats {b} of them and splits the rest equally among {c} neighbors. "
                "How many {item} does each neighbor get?"
            ),
            (
                "Of {a} {item}, {b} get burnt. {name} lays the others on {c} plates in equal numbers. "
                "How many {item} are on each plate?"
            ),
        ),
        {"name": PEOPLE, "item": TREATS, "a": range(10, 41), "b": SMALL, "c": range(2, 8)},
        ("There are [rest = a-b] {item} to share.", "Each gets [each = rest/c] {item}."),
    ),
    Template(
        "times",
        (
            "{name} has {a} {item}. {friend} has {b} times as many. How many {item} do they have together?",
            "{friend} collects {b} times as many {item} as {name}, who collects {a}. How many {item} do both collect?",
        ),
        {"name": PEOPLE, "friend": PEOPLE, "item": TOYS, "a": range(3, 15), "b": range(2, 6)},
        ("{friend} has [other = a*b] {item}.", "Together they have [total = a+other] {item}."),
    ),
    Template(
        "bus",
        (
            (
                "A bus leaves the station with {a} people. At the first stop {b} get off and {c} get on. "
                "How many people are on the bus now?"
            ),
            (
                "{a} people ride a train. Then {b} of them leave and {c} new ones enter. "
                "How many people does the train carry?"
            ),
        ),
        {"a": range(12, 50), "b": SMALL, "c": range(2, 20)},
        ("After some leave, there are [stay = a-b] people.", "Now there are [now = stay+c] people."),
    ),
    Template(
        "savings",
        (
            "{name} saves ${a} a week for {b} weeks and then spends ${c} on a gift. How many dollars are left?",
            "For {b} weeks {name} earns ${a} every week. A ticket takes ${c} of it. How many dollars does {name} keep?",
        ),
        {"name": PEOPLE, "a": range(3, 13), "b": SMALL, "c": range(2, 20)},
        ("{name} collects [saved = a*b] dollars.", "There are [left = saved-c] dollars left."),
    ),
    Template(
        "bakery",
        (
            (
                "{name} bakes {a} trays of {b} {item}, sells {c} of them and packs the rest into {box} of {d}. "
                "How many {box} does {name} fill?"
            ),
            (
                "A kitchen makes {a} batches of {b} {item}. {name} sells {c} and puts the rest into {box}, "
                "{d} in each. How many {box} are needed?"
            ),
        ),
        {"name": PEOPLE, "item": TREATS, "box": BOXES, "a": SMALL, "b": range(4, 13), "c": LARGE, "d": range(2, 7)},
        (
            "{name} has [made = a*b] {item}.",
            "After the sale there are [rest = made-c] {item}.",
            "They fill [full = rest/d] {box}.",
        ),
    ),
    Template(
        "jobs",
        (
            (
                "{name} works {a} hours in a garden for ${b} an hour and {c} hours in a shop for ${d} an hour. "
                "How many dollars does {name} earn?"
            ),
            (
                "A garden pays ${b} an hour, a shop ${d} an hour. {name} spends {a} hours in the garden "
                "and {c} in the shop. How many dollars is that?"
            ),
        ),
        {"name": PEOPLE, "a": SMALL, "b": range(5, 13), "c": SMALL, "d": range(5, 13)},
        (
            "The garden pays [first = a*b] dollars.",
            "The shop pays [second = c*d] dollars.",
            "In all {name} earns [total = first+second] dollars.",
        ),
    ),
    Template(
        "runner",
        (
            (
                "{name} runs {a} kilometers on Monday, {b} more than that on Tuesday, and on Wednesday {c} times as "
                "far as on Tuesday. How many kilometers does {name} run on Tuesday and Wednesday together?"
            ),
            (
                "In week one {name} cycles {a} kilometers. Week two adds {b} to that, and week three is {c} times "
                "week two. How many kilometers are weeks two and three together?"
            ),
        ),
        {"name": PEOPLE, "a": range(2, 12), "b": SMALL, "c": range(2, 5)},
        (
            "The second distance is [second = a+b] kilometers.",
            "The third distance is [third = second*c] kilometers.",
            "Together that is [total = second+third] kilometers.",
        ),
    ),
    Template(
        "party",
        (
            (
                "For a party {name} buys {a} {item} at ${b} each and {c} balloons at ${d} each, paying with ${e}. "
                "How many dollars does {name} get back?"
            ),
            (
                "{name} takes ${e} to a shop, where {item} cost ${b} each and balloons ${d} each. "
                "How many dollars are left after buying {a} {item} and {c} balloons?"
            ),
        ),
        {
            "name": PEOPLE,
            "item": TREATS,
            "a": SMALL,
            "b": range(2, 6),
            "c": SMALL,
            "d": range(2, 6),
            "e": (50, 80, 100),
        },
        (
            "The {item} cost [first = a*b] dollars.",
            "The balloons cost [second = c*d] dollars.",
            "Both cost [cost = first+second] dollars.",
            "There are [back = e-cost] dollars left.",
        ),
    ),
    Template(
        "library",
        (
            (
                "{name}'s library has {a} shelves with {b} books on each. One week {c} books are lent out and {d} come "
                "back. How many books are on the shelves then?"
            ),
            (
                "{name} fills {a} shelves with {b} books each, sells {c} of the books and buys {d} new ones. "
                "How many books does {name} have now?"
            ),
        ),
        {"name": PEOPLE, "a": range(3, 10), "b": LARGE, "c": LARGE, "d": SMALL},
        (
            "At first there are [full = a*b] books.",
            "Then [fewer = full-c] books remain.",
            "At the end there are [now = fewer+d] books.",
        ),
    ),
    Template(
        "garden",
        (
            "{name} plants {a} rows of {b} {item} and {c} rows of {d} {other}. How many plants are there in total?",
            (
                "In {name}'s field grow {a} rows with {b} {item} each, and {c} rows with {d} {other} each. "
                "How many plants does the field have?"
            ),
        ),
        {"name": PEOPLE, "item": PLANTS, "other": PLANTS, "a": SMALL, "b": SMALL, "c": SMALL, "d": SMALL},
        (
            "There are [first = a*b] {item}.",
            "There are [second = c*d] {other}.",
            "The total is [total = first+second] plants.",
        ),
    ),
    Template(
        "teams",
        (
            (
                "{name} runs a camp with {a} girls and {b} boys. They form teams of {c}, and each team gets {d} balls. "
                "How many balls does the camp need?"
            ),
            (
                "{name} invites {a} cousins and {b} classmates and seats {c} guests at each table, with {d} lamps per "
                "table. How many lamps does {name} need?"
            ),
        ),
        {"name": PEOPLE, "a": LARGE, "b": LARGE, "c": range(3, 8), "d": range(2, 6)},
        (
            "Altogether there are [all = a+b] people.",
            "They make [groups = all/c] groups.",
            "The groups need [need = groups*d] in total.",
        ),
    ),
)
