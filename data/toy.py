"""The embedded task, the commonest kind, with its rule-based teacher.

    input       Mia packed plum, hammer, fox, pear, sofa. Mostly what?
    rationale   fruit tools animals fruit furniture
    label       fruit

Nobody tells the student which of the 144 words is of which kind. A label says only which kind won,
about two and a half bits a row; the rationale names the kind of every item, in order. It names no
item, so a rationale moved to another row teaches nothing (`--method dss-shuffled`).

What makes the effect clear, two seeds each: many words for few rows (with 12 words a kind and
2,000 rows standard finetuning is right at 90 %, step-by-step at 96 %), and rationales in which
every token is news, because L_rationale is a mean over tokens (in an early trial "they are fruit,
tools, ... . most are fruit." gained 7 points instead of 13).
"""

import random
from collections import Counter

from data.jsonl import Record

WORDS = {  # of each kind
    "fruit": (
        "plum pear kiwi mango lemon cherry banana grape peach melon lime fig date coconut "
        "papaya guava quince raspberry strawberry blueberry nectarine pomegranate "
        "tangerine grapefruit"
    ),
    "tools": (
        "hammer saw drill wrench chisel rake shovel spade hoe pickaxe ladder clamp level "
        "pitchfork crowbar mallet trowel screwdriver sander scythe sickle file vise "
        "wheelbarrow"
    ),
    "animals": (
        "fox goat horse rabbit tiger mouse duck camel wolf bear deer donkey zebra giraffe "
        "monkey beaver badger hedgehog squirrel pigeon falcon lizard turtle frog"
    ),
    "clothes": (
        "scarf hat glove shirt sock jacket skirt belt coat dress sweater vest tie cap "
        "boot sandal slipper blouse hood cardigan robe mitten shawl raincoat"
    ),
    "furniture": (
        "sofa desk chair shelf stool bench cupboard table bed wardrobe dresser bookcase "
        "cabinet armchair couch crib nightstand sideboard footstool hammock futon chest "
        "mirror lamp"
    ),
    "vehicles": (
        "truck bus train bicycle tram boat scooter van taxi car tractor ferry ship canoe "
        "kayak helicopter plane rocket sled wagon cart motorcycle submarine limousine"
    ),
}
WORDS = {kind: words.split() for kind, words in WORDS.items()}
NAMES = "Mia Noah Lena Omar Ruth Ivan Sara Hugo Nina Paul Vera Finn"
VERBS = "packed drew bought sold found moved"
SIZES = {"train": 400, "validation": 200, "test": 1000}


def make_rows(seed: int = 0) -> tuple[list[Record], list[Record], list[Record]]:
    """(train, validation, test), drawn by `seed`. No question is there twice."""
    rng = random.Random(seed)
    seen = set()
    parts = []
    for split, size in SIZES.items():
        rows = []
        while len(rows) < size:
            kinds = rng.choices(list(WORDS), k=rng.randint(4, 6))
            (label, most), *others = Counter(kinds).most_common(2)
            if others and others[0][1] == most:
                continue  # two kinds are equally often there
            items = [rng.choice(WORDS[kind]) for kind in kinds]
            did = f"{rng.choice(NAMES.split())} {rng.choice(VERBS.split())}"
            question = f"{did} {', '.join(items)}. Mostly what?"
            if question in seen:
                continue
            seen.add(question)
            rationale = " ".join(kinds)
            name = f"toy-{split}-{len(rows)}"
            rows.append(Record(name, question, label, rationale, label, {"model": "rule"}))
        parts.append(rows)
    return tuple(parts)
