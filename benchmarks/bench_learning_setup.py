"""
What the runs of `bench_learning.py` start from: four tasks with their scores, models that imitate noisy answers, and
what every trainer is told.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPast


PAD, END, ASK = "<pad>", "<eos>", "="
DIGITS = [str(digit) for digit in range(10)]
MODULUS = 5  # of the sums
KEYS = list("abcdef")
IDLE = ["so", "well", "then", "hm"]
VOCABULARY = [PAD, END, ASK, *DIGITS, *KEYS, *IDLE, "get", "[", "]"]
ID = {word: i for i, word in enumerate(VOCABULARY)}
MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": 64}
# As in trl_ext/models/sampling.py, which is not there in the environment of TRL 1.12.
CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"

Words = list[str]
Job = dict[str, Any]


# --- tasks: a prompt in words ends with "="; an answer, if it was not cut off, with "<eos>"


@dataclass(frozen=True)
class Task:
    """
    Args:
        prompt, answer: draw a prompt, and an answer to it; with `noise` 0 the answer is right.
        score: of prompt and answer, from 0 to 1.
        limit: words of an answer at most.
        noise: share of wrong turns in the answers that the start imitates.
        observe: what a tool says once an answer has come so far; nothing unless a call has just been made.
        imitation: steps of 128 answers in which the start learns to imitate.
    """

    prompt: Callable[[Random], Words]
    answer: Callable[[Words, Random, float], Words]
    score: Callable[[Words, Words], float]
    limit: int
    noise: float
    imitation: int
    observe: Callable[[Words, Words], Words] | None = None


def digits(count: int, below: int = 10) -> Callable[[Random], Words]:
    return lambda random: [*random.choices(DIGITS[:below], k=count), ASK]


def sorted_with_slips(prompt: Words, random: Random, noise: float) -> Words:
    """Sort the digits of the prompt; each place may have any of them instead."""
    given = prompt[:-1]
    return [random.choice(given) if random.random() < noise else digit for digit in sorted(given)] + [END]


def share_of_right_places(prompt: Words, answer: Words) -> float:
    """Compare with the sorted digits and the end behind them, place by place; places too many count as wrong."""
    right = [*sorted(prompt[:-1]), END]
    return sum(a == b for a, b in zip(answer, right, strict=False)) / max(len(answer), len(right))


def running_sums(prompt: Words, random: Random, noise: float) -> Words:
    """Add the digits one by one, modulo `MODULUS`; a wrong sum is carried on."""
    terms = [int(word) for word in prompt[:-1]]
    total, steps = terms[0], []
    for term in terms[1:]:
        total = (total + term + (random.randrange(1, MODULUS) if random.random() < noise else 0)) % MODULUS
        steps.append(str(total))
    return [*steps, END]


def has_right_sum(prompt: Words, answer: Words) -> float:
    """Return 1 if the last word before the end is the sum of all digits, whatever stands before it."""
    return float(answer[-1:] == [END] and answer[-2:-1] == [str(sum(map(int, prompt[:-1])) % MODULUS)])


def largest_then_idle(prompt: Words, random: Random, noise: float) -> Words:
    """Say the largest digit, or any of the prompt's, and then 14 to 26 idle words."""
    given = prompt[:-1]
    first = random.choice(given) if random.random() < noise else max(given)
    return [first, *random.choices(IDLE, k=random.randint(14, 26)), END]


def begins_with_largest(prompt: Words, answer: Words) -> float:
    return float(answer[0] == max(prompt[:-1]) and answer[-1] == END)


def two_keys(random: Random) -> Words:
    """Draw two keys, and three digits that make the prompt one of many."""
    return [*random.sample(KEYS, 2), *random.choices(DIGITS, k=3), ASK]


def looked_up(prompt: Words, key: str) -> str:
    """Return the digit that a key stands for in a prompt; it can only be known by asking the tool."""
    return Random(f"{' '.join(prompt)} {key}").choice(DIGITS)


def tool_result(prompt: Words, answer: Words) -> Words:
    """Return `[ digit ]` behind `get key`, else nothing."""
    is_call = answer[-2:-1] == ["get"] and answer[-1] in KEYS
    return ["[", looked_up(prompt, answer[-1]), "]"] if is_call else []


def asks_then_largest(prompt: Words, random: Random, noise: float) -> Words:
    """Ask for both keys and say the larger digit; each key may be any other, and the result any digit."""
    answer: Words = []
    for key in prompt[:2]:
        answer += ["get", random.choice(KEYS) if random.random() < noise / 2 else key]
        answer += tool_result(prompt, answer)
    largest = max(looked_up(prompt, key) for key in prompt[:2])
    return [*answer, random.choice(DIGITS) if random.random() < noise else largest, END]


def ends_with_largest(prompt: Words, answer: Words) -> float:
    """Return 1 if the last word before the end is the larger digit of the two keys, and nothing of the tool's."""
    largest = max(looked_up(prompt, key) for key in prompt[:2])
    return float(answer[-1:] == [END] and answer[-2:-1] == [largest])


TASKS = {
    "sorting": Task(digits(6), sorted_with_slips, share_of_right_places, limit=8, noise=0.6, imitation=600),
    "arithmetic": Task(digits(7, MODULUS), running_sums, has_right_sum, limit=8, noise=0.25, imitation=1500),
    "late score": Task(digits(4), largest_then_idle, begins_with_largest, limit=32, noise=0.6, imitation=800),
    "tool": Task(two_keys, asks_then_largest, ends_with_largest, 14, noise=0.4, imitation=1000, observe=tool_result),
}
HELD_OUT = 128


def held_out_prompts(task: Task) -> list[Words]:
    random = Random("held out")
    return [task.prompt(random) for _ in range(HELD_OUT)]


def training_prompts(task: Task, count: int, seed: int) -> list[Words]:
    """Return prompts that are not held out, the same for every trainer."""
    random, kept = Random(f"train {seed}"), {tuple(prompt) for prompt in held_out_prompts(task)}
    prompts: list[Words] = []
    while len(prompts) < count:
        prompt = task.prompt(random)
        if tuple(prompt) not in kept:
            prompts.append(prompt)
    return prompts


# --- models


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(ID, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, padding_side="left")


def ids_of(words: Sequence[str]) -> list[int]:
    return [ID[word] for word in words]


def words_of(ids: Sequence[int]) -> Words:
    return [VOCABULARY[i] for i in ids]


def imitator(task: Task) -> LlamaForCausalLM:
    """Return a model that has learned to answer like `task.answer` with its noise."""
    set_seed(0)
    of_ids = {"pad_token_id": ID[PAD], "bos_token_id": None, "eos_token_id": ID[END]}
    model = LlamaForCausalLM(LlamaConfig(**MODEL, **of_ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=task.imitation)
    random = Random("imitation")
    for _ in range(task.imitation):
        rows, labels = [], []
        for _ in range(128):
            prompt = task.prompt(random)
            answer = ids_of(task.answer(prompt, random, task.noise))
            rows.append(torch.tensor([*ids_of(prompt), *answer]))
            labels.append(torch.tensor([*[-100] * len(prompt), *answer]))
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ID[PAD])
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
        logits = model(input_ids=inputs[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def start_of(name: str, cache: Path) -> Path:
    """Return the folder of the model that a task starts from, named by what makes it."""
    task = TASKS[name]
    made_by = json.dumps([name, MODEL, VOCABULARY, task.noise, task.imitation, task.limit])
    return cache / "bench-learning" / f"{name.replace(' ', '-')}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"


def make_start(name: str, folder: Path) -> None:
    """Make the model that a task starts from, unless it is there."""
    if not (folder / "complete").exists():
        print(f"{name}: making the start, once", flush=True)
        imitator(TASKS[name]).save_pretrained(folder)
        (folder / "complete").touch()


@torch.no_grad()
def play(model: Any, task: Task, prompts: Sequence[Words]) -> dict[str, list[list[Any]]]:
    """
    Sample an answer to each prompt at temperature 1, with what the tool says in between.

    All rows grow by a word at a time: one that the policy draws, or the next of what the tool has said.

    Returns:
        What a `rollout_func` returns: `prompt_ids`, `completion_ids`, `logprobs`, and `env_mask`, 0 at the tool's.
    """
    rows = [ids_of(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    read = torch.tensor([[ID[PAD]] * (longest - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    answers: list[list[int]] = [[] for _ in rows]
    logprobs: list[list[float]] = [[] for _ in rows]
    masks: list[list[int]] = [[] for _ in rows]
    said: list[list[int]] = [[] for _ in rows]
    cache = None
    for _ in range(task.limit):
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -read.size(1) :]
        output = model(input_ids=read, attention_mask=real, position_ids=positions, use_cache=True, **{CACHE: cache})
        cache, log_probs = output[CACHE], output.logits[:, -1].float().log_softmax(-1)
        drawn = torch.multinomial(log_probs.exp(), 1).squeeze(1).tolist()
        for i, answer in enumerate(answers):
            if answer and answer[-1] == ID[END]:
                drawn[i] = ID[PAD]
                continue
            masks[i].append(0 if said[i] else 1)
            drawn[i] = said[i].pop(0) if said[i] else drawn[i]
            logprobs[i].append(log_probs[i, drawn[i]].item())
            answer.append(drawn[i])
            if task.observe is not None and masks[i][-1]:
                said[i] = ids_of(task.observe(prompts[i], words_of(answer)))
        if all(answer[-1] == ID[END] for answer in answers):
            break
        read = torch.tensor(drawn)[:, None]
        real = torch.cat([real, torch.ones_like(read)], dim=1)
    return {"prompt_ids": rows, "completion_ids": answers, "logprobs": logprobs, "env_mask": masks}


def held_out_score(model: Any, task: Task) -> float:
    """Return the mean score of one sampled answer to each held-out prompt; the run's random numbers stay its own."""
    prompts, was_training = held_out_prompts(task), model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        answers = play(model, task, prompts)["completion_ids"]
    model.train(was_training)
    scores = [task.score(prompt, words_of(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
    return sum(scores) / len(scores)


def load_start(folder: Path, model_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return model_class.from_pretrained(folder, dtype=torch.float32, **options)
