"""Generates word problems in five languages, with reasoning in a language that the user asks for.

A problem begins with a number of things and has one or two steps. Each step adds or takes away some of them. All
numbers are from 2 to 20. The question, the reasoning and the answer are made from templates. The question and the
answer have the same language. The reasoning has a language of its own, as in multilingual reasoning data.

All possible problems are shuffled and cut into three splits. A problem consists of its numbers and operations, without
language, name and things. So no split has a problem of another split, however it is worded.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

LEAST, MOST = 2, 20
"""Smallest and largest number in a problem, results included."""

Item = TypeVar("Item")

SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
"""Name of a split -> share of the problems."""

_SHUFFLE = 20  # seed of the order of all problems, which decides their splits
_ONE_STEP = 0.4  # share of the rows with one step


@dataclass(frozen=True)
class Templates:
    """The sentences of one language.

    Attributes:
        things: plural nouns, feminine where the language has genders, so that one form of "how many" fits all.
        first: what somebody has.
        gains: sentences that add things.
        losses: sentences that take things away.
        ask: the question.
        start: first sentence of the reasoning.
        add: sentence of the reasoning about a gain.
        subtract: sentence of the reasoning about a loss.
        answer: the answer. It has enough letters for the language to be recognized.
    """

    things: tuple[str, ...]
    first: str
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    ask: str
    start: str
    add: str
    subtract: str
    answer: str


LANGUAGES = {
    "English": Templates(
        things=("apples", "coins", "shells", "cards", "roses", "keys"),
        first="{name} has {a} {things}.",
        gains=("{name} buys {b} more.", "{name} finds {b} more."),
        losses=("{name} gives away {b}.", "{name} loses {b}."),
        ask="How many {things} does {name} have now?",
        start="At the beginning there are {a} {things}.",
        add="Then {b} more are added: {x} + {b} = {y}.",
        subtract="Then {b} are taken away: {x} - {b} = {y}.",
        answer="In the end {name} has a total of {y} {things}.",
    ),
    "German": Templates(
        things=("Äpfel", "Münzen", "Muscheln", "Karten", "Rosen", "Schlüssel"),
        first="{name} hat {a} {things}.",
        gains=("{name} kauft noch {b}.", "{name} findet noch {b}."),
        losses=("{name} verschenkt {b}.", "{name} verliert {b}."),
        ask="Wie viele {things} hat {name} jetzt?",
        start="Am Anfang sind es insgesamt {a} {things}.",
        add="Danach kommen noch {b} hinzu: {x} + {b} = {y}.",
        subtract="Danach werden {b} weggenommen: {x} - {b} = {y}.",
        answer="Am Ende besitzt {name} also insgesamt {y} {things}.",
    ),
    "French": Templates(
        things=("pommes", "pièces", "coquilles", "cartes", "roses", "clés"),
        first="{name} a {a} {things}.",
        gains=("{name} en achète encore {b}.", "{name} en trouve encore {b}."),
        losses=("{name} en offre {b}.", "{name} en perd {b}."),
        ask="Combien de {things} {name} possède maintenant ?",
        start="Au début, il y a en tout {a} {things}.",
        add="Ensuite, on en ajoute encore {b} : {x} + {b} = {y}.",
        subtract="Ensuite, on en enlève {b} : {x} - {b} = {y}.",
        answer="À la fin, {name} possède en tout {y} {things}.",
    ),
    "Spanish": Templates(
        things=("manzanas", "monedas", "conchas", "cartas", "rosas", "llaves"),
        first="{name} tiene {a} {things}.",
        gains=("{name} compra {b} más.", "{name} encuentra {b} más."),
        losses=("{name} regala {b}.", "{name} pierde {b}."),
        ask="¿Cuántas {things} tiene {name} ahora?",
        start="Al principio hay en total {a} {things}.",
        add="Luego se añaden otras {b}: {x} + {b} = {y}.",
        subtract="Luego se quitan {b} de ellas: {x} - {b} = {y}.",
        answer="Así que al final {name} tiene {y} {things} en total.",
    ),
    "Italian": Templates(
        things=("mele", "monete", "conchiglie", "carte", "rose", "chiavi"),
        first="{name} ha {a} {things}.",
        gains=("{name} ne compra altre {b}.", "{name} ne trova altre {b}."),
        losses=("{name} ne regala {b}.", "{name} ne perde {b}."),
        ask="Quante {things} ha {name} adesso?",
        start="All'inizio ci sono in tutto {a} {things}.",
        add="Poi se ne aggiungono altre {b}: {x} + {b} = {y}.",
        subtract="Poi se ne tolgono {b}: {x} - {b} = {y}.",
        answer="Alla fine {name} possiede in tutto {y} {things}.",
    ),
}
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix")


@dataclass(frozen=True)
class Problem:
    """A problem without its words.

    Attributes:
        start: number of things at the beginning.
        changes: number of things that each step adds. It is negative if the step takes things away.
    """

    start: int
    changes: tuple[int, ...]

    @property
    def result(self) -> int:
        """The right answer."""
        return self.start + sum(self.changes)


@dataclass(frozen=True)
class Wording:
    """The words of a problem.

    Attributes:
        question: language of the question and of the answer.
        requested: language that the prompt requests for the reasoning.
        name: number of the name.
        thing: number of the things.
        verbs: number of the verb of each step.
    """

    question: str
    requested: str
    name: int
    thing: int
    verbs: tuple[int, ...]


@cache
def problems(split: str) -> dict[int, list[Problem]]:
    """Return all problems of a split, by their number of steps. A problem belongs to exactly one split."""
    found: dict[int, list[Problem]] = {}
    for steps in (1, 2):
        every = _every_problem(steps)
        random.Random(_SHUFFLE).shuffle(every)
        found[steps] = part_of(every, split)
    return found


def part_of(every: Sequence[Item], split: str) -> list[Item]:
    """Return the items of a split. `every` is in random order, and each item belongs to exactly one split."""
    begin = 0.0
    for name, share in SPLITS.items():
        if name == split:
            return list(every[round(begin * len(every)) : round((begin + share) * len(every))])
        begin += share
    raise KeyError(split)


def _every_problem(steps: int) -> list[Problem]:
    found = [Problem(start, ()) for start in range(LEAST, MOST + 1)]
    for _ in range(steps):
        found = [
            Problem(each.start, (*each.changes, result - each.result))
            for each in found
            for result in range(LEAST, MOST + 1)
            if abs(result - each.result) >= LEAST
        ]
    return found


def draw(split: str, random_numbers: random.Random) -> tuple[Problem, Wording]:
    """Draw a problem of a split, and words for it."""
    steps = 1 if random_numbers.random() < _ONE_STEP else 2
    problem = random_numbers.choice(problems(split)[steps])
    languages = list(LANGUAGES)
    wording = Wording(
        question=random_numbers.choice(languages),
        requested=random_numbers.choice(languages),
        name=random_numbers.randrange(len(NAMES)),
        thing=random_numbers.randrange(len(LANGUAGES["English"].things)),
        verbs=tuple(random_numbers.randrange(2) for _ in problem.changes),
    )
    return problem, wording


def row(problem: Problem, wording: Wording, reasoning: str) -> dict[str, Any]:
    """Return a row of a data set: a conversation, and the language that it requests for the reasoning.

    Args:
        problem: the numbers.
        wording: the words.
        reasoning: language in which the assistant reasons. In training data, it is `wording.requested`.
    """
    own = LANGUAGES[wording.question]
    words = {"name": NAMES[wording.name], "things": own.things[wording.thing]}
    question = [own.first.format(a=problem.start, **words)]
    for change, verb in zip(problem.changes, wording.verbs, strict=True):
        sentence = (own.gains if change > 0 else own.losses)[verb]
        question.append(sentence.format(b=abs(change), **words))
    question.append(own.ask.format(**words))
    answer = {"role": "assistant", "thinking": _reason(problem, wording, reasoning)}
    return {
        "reasoning_language": wording.requested,
        "messages": [
            {"role": "user", "content": " ".join(question)},
            {**answer, "content": own.answer.format(y=problem.result, **words)},
        ],
    }


def _reason(problem: Problem, wording: Wording, language: str) -> str:
    templates = LANGUAGES[language]
    sentences = [templates.start.format(a=problem.start, things=templates.things[wording.thing])]
    value = problem.start
    for change in problem.changes:
        sentence = templates.add if change > 0 else templates.subtract
        sentences.append(sentence.format(b=abs(change), x=value, y=value + change))
        value += change
    return " ".join(sentences)


def rows(split: str, count: int) -> list[dict[str, Any]]:
    """Return the first rows of a split. Every call returns the same rows. No question occurs twice.

    The prompts request the languages of LANGUAGES for the reasoning, one after the other.

    Rows of the split `test` also have the properties that scorers need: `answer` and `answer_language`.
    """
    random_numbers = random.Random(f"word problems, {split}")
    requested = list(LANGUAGES)
    found: dict[tuple[Problem, Wording], dict[str, Any]] = {}
    while len(found) < count:
        problem, wording = draw(split, random_numbers)
        wording = replace(wording, requested=requested[len(found) % len(requested)])
        made = row(problem, wording, wording.requested)
        if split == "test":
            made |= {"answer": str(problem.result), "answer_language": wording.question}
        found[problem, wording] = made
    return list(found.values())
