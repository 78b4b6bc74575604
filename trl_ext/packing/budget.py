"""Sequences cut into parts of at most so many tokens. Pure Python."""

from collections.abc import Sequence


def size_of_parts(largest: int, whole: int, group: int) -> int:
    """Return the largest size, up to `largest`, of equal parts of `whole` sequences that keeps groups together."""
    sizes = range(1, largest + 1)
    return max(size for size in sizes if whole % size == 0 and (size % group == 0 or group % size == 0))


def cut_by_tokens(
    prompts: Sequence[int], answers: Sequence[int], budget: int, packs: bool, groups: Sequence[Sequence[int]]
) -> list[list[int]]:
    """
    Return the sequences in few parts of at most `budget` tokens each; a longer sequence has a part of its own.

    Args:
        prompts, answers: tokens of each sequence.
        packs: whether a part is a row without padding, with the prompt of a group once. If not, it is a rectangle:
            prompts padded on the left, answers on the right.
        groups: the sequences by their prompts. A group stays whole where it fits.
    """
    group_of = {member: number for number, group in enumerate(groups) for member in group}

    def size(members: list[int]) -> int:
        if packs:
            shared = {group_of[member]: prompts[member] for member in members}
            return sum(shared.values()) + sum(answers[member] for member in members)
        return len(members) * (max(prompts[m] for m in members) + max(answers[m] for m in members))

    # 1. Groups, cut where they do not fit
    chunks: list[list[int]] = []
    for group in groups:
        chunks.append([])
        for member in group:
            if chunks[-1] and size([*chunks[-1], member]) > budget:
                chunks.append([])
            chunks[-1].append(member)
    # 2. The largest first, each into the first part that has room; in a rectangle beside those as long as it is
    parts: list[list[int]] = []
    for chunk in sorted(chunks, key=size, reverse=True):
        tried = parts if packs else parts[-1:]
        part = next((part for part in tried if size(part + chunk) <= budget), None)
        if part is None:
            parts.append(list(chunk))
        else:
            part += chunk
    return parts
