"""A corpus made on the spot: sentences over a small vocabulary, from a fixed seed."""

import random

SUBJECTS = ["the cat", "a dog", "the old house", "every river", "my sister", "the machine", "a small bird", "the king"]
VERBS = ["sees", "likes", "follows", "builds", "forgets", "carries", "paints", "remembers"]
OBJECTS = ["the mountain", "a red door", "the second letter", "seven stones", "the open sea", "a broken clock"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to about 40 sentences over a small vocabulary, a few of them long."""
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        sentences = rng.randint(1, 6) if number % 10 else rng.randint(20, 40)
        words = [f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}." for _ in range(sentences)]
        texts.append(" ".join(words))
    return texts
