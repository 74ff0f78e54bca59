"""Masking by tokens, words and spans in plain loops over Python integers: slow, and easy to read."""

from collections.abc import Sequence

from neobert.objectives.masking import MaskPolicy

BITS = 2**64 - 1


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)


def split_runs(policy: MaskPolicy, tokens: Sequence[int]) -> list[list[list[int]]]:
    """Runs between special tokens -> words (or tokens) -> indices."""
    runs: list[list[list[int]]] = []
    for place, token in enumerate(tokens):
        if token in policy.special_ids:
            continue
        if place == 0 or tokens[place - 1] in policy.special_ids:
            runs.append([[place]])
        elif (
            policy.units != "tokens" and policy.edges.continues[token] and policy.edges.is_continued[tokens[place - 1]]
        ):
            runs[-1][-1].append(place)
        else:
            runs[-1].append([place])
    return runs


def span_length(word: int, most: int) -> int:
    """The length whose part of the 32-bit numbers holds this one: 5/5, 4/5, 16/25, ... of the first part."""
    drawn = mix(~word & BITS) >> 32
    weights = [0.8**n for n in range(most)]
    length, reached = 1, weights[0] / sum(weights)
    while drawn >= reached * 2**32 and length < most:
        reached += weights[length] / sum(weights)
        length += 1
    return length


def select(policy: MaskPolicy, tokens: Sequence[int], words: Sequence[int], count: int) -> dict[int, int]:
    """Index -> the hash that decides what replaces it, for `count` indices."""
    runs = split_runs(policy, tokens)
    spans: list[tuple[int, list[list[int]]]] = []
    for run in runs:
        for number, unit in enumerate(run):
            length = min(len(run), span_length(words[unit[0]], policy.span_max_words)) if policy.units == "spans" else 1
            # At the end of its run a span continues at the start.
            spans.append((words[unit[0]], [run[(number + step) % len(run)] for step in range(length)]))
    chosen: dict[int, int] = {}
    for word, units in sorted(spans):
        for place in (place for unit in units for place in unit):
            if place not in chosen and len(chosen) < count:
                chosen[place] = word if policy.units == "spans" else words[place]
    return chosen


def corrupt(
    policy: MaskPolicy, tokens: Sequence[int], words: Sequence[int], offset: float
) -> tuple[list[int], list[int]]:
    """What `MaskPolicy.corrupt` gives."""
    maskable = sum(token not in policy.special_ids for token in tokens)
    count = min(maskable, int(policy.probability * maskable + offset))
    chosen, corrupted = select(policy, tokens, words, count), list(tokens)
    for place, deciding in chosen.items():
        choice, drawn = mix(deciding) >> 32, mix(words[place]) & 0xFFFFFFFF
        if choice < policy.mask_fraction * 2**32 or policy.mask_all:
            corrupted[place] = policy.mask_token_id
        elif choice < (policy.mask_fraction + policy.random_fraction) * 2**32:
            corrupted[place] = int(policy.random_ids[drawn * len(policy.random_ids) >> 32])
    return corrupted, sorted(chosen)
