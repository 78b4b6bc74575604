"""
How much of the scores to come a critic can tell, read from the policy's own states or with a trunk of its own: why
`critic="head"` learns less than `critic="model"` on the tasks of `bench_learning.py`.

    python benchmarks/measure_value_heads.py                                   # about 5 minutes on 2 cores
    python benchmarks/measure_value_heads.py --tasks sorting --answers 1024

The start of each task answers prompts; from every token that counts, four fifths of the answers teach three critics
their score, and the explained variance is that of the last fifth: a linear head by least squares, a head with a hidden
layer, both on the states that the policy has, and a head on a copy of the trunk, which learns with it. For the latter
two, the best of 12 passes.
"""

import argparse
import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from bench_learning_setup import (
    ID,
    MODEL,
    PAD,
    TASKS,
    Task,
    load_start,
    make_start,
    play,
    start_of,
    training_prompts,
    words_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trl_ext.data.demo import cache_dir
from trl_ext.masked import explained_variance


Predict = Callable[[Tensor], Tensor]  # rows -> a value at every token


def sampled(model: nn.Module, task: Task, answers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids (N, T), where a value is asked for (N, T), and the score of each answer at every token (N, T)."""
    torch.manual_seed(0)
    rows, counts, scores = [], [], []
    prompts = training_prompts(task, answers, seed=0)
    for i in range(0, answers, 256):
        played = play(model, task, prompts[i : i + 256])
        for prompt, answer, own in zip(
            played["prompt_ids"], played["completion_ids"], played["env_mask"], strict=True
        ):
            rows.append(torch.tensor(prompt + answer))
            # A value stands at the token before the one that it judges.
            counts.append(torch.tensor([0] * (len(prompt) - 1) + own + [0], dtype=torch.bool))
            scores.append(task.score(words_of(prompt), words_of(answer)))
    ids, mask = pad_sequence(rows, batch_first=True, padding_value=ID[PAD]), pad_sequence(counts, batch_first=True)
    return ids, mask, torch.tensor(scores)[:, None].expand(ids.shape)


def by_least_squares(states: Tensor, mask: Tensor, scores: Tensor) -> Predict:
    """Return the linear head with the least squared error over the tokens of the mask."""
    inputs = torch.cat([states, torch.ones_like(states[..., :1])], dim=-1).double()
    known = inputs[: len(mask)][mask]
    ridge = 1e-2 * torch.eye(known.size(1), dtype=torch.float64)
    weight = torch.linalg.solve(known.T @ known + ridge, known.T @ scores[mask].double())
    return lambda rows: (inputs[rows] @ weight).float()


def best_of_passes(
    parameters: Iterable[nn.Parameter], predict: Predict, mask: Tensor, scores: Tensor, learned: int, passes: int
) -> float:
    """Train on the first `learned` rows, and return the best explained variance of the others after a pass."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    best = -float("inf")
    for _ in range(passes):
        for rows in torch.randperm(learned).split(128):
            loss = (predict(rows) - scores[rows])[mask[rows]].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held_out = torch.cat([predict(rows) for rows in torch.arange(learned, len(mask)).split(512)])
        best = max(best, explained_variance(held_out, scores[learned:], mask[learned:]).item())
    return best


def measure(name: str, cache: Path, answers: int, passes: int) -> list[float]:
    """Return the explained variance of a linear head, a head with a hidden layer, and a trunk of its own."""
    task, folder = TASKS[name], start_of(name, cache)
    make_start(name, folder)
    model = load_start(folder).eval()
    ids, mask, scores = sampled(model, task, answers)
    learned = 4 * answers // 5
    with torch.no_grad():
        states = torch.cat([model.model(input_ids=rows).last_hidden_state for rows in ids.split(512)])
    linear = by_least_squares(states, mask[:learned], scores[:learned])(torch.arange(learned, answers))
    explained = explained_variance(linear, scores[learned:], mask[learned:]).item()
    width = MODEL["hidden_size"]
    hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 1))
    trunk, head = copy.deepcopy(model.model), nn.Linear(width, 1)
    more = (mask, scores, learned, passes)
    of_hidden = best_of_passes(hidden.parameters(), lambda rows: hidden(states[rows]).squeeze(-1), *more)
    of_trunk = best_of_passes(
        [*trunk.parameters(), *head.parameters()],
        lambda rows: head(trunk(input_ids=ids[rows]).last_hidden_state).squeeze(-1),
        *more,
    )
    return [explained, of_hidden, of_trunk]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--answers", type=int, default=5120, help="to learn from and to measure on")
    parser.add_argument("--passes", type=int, default=12, help="over the answers")
    parser.add_argument("--cache", type=Path, default=cache_dir(), help="folder of starts")
    args = parser.parse_args(argv)
    print("| task | linear head | head with a hidden layer | trunk of its own |\n|---|---:|---:|---:|")
    for name in args.tasks:
        explained = measure(name, args.cache, args.answers, args.passes)
        print(f"| *{name}* | {' | '.join(f'{each:.3f}' for each in explained)} |", flush=True)


if __name__ == "__main__":
    main()
