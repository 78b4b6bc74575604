"""
The worked sample of DPO, about the Great Wall: the loss of one pair in three steps, with numbers.

    python experiments/worked_sample.py    # half a minute on one CPU core

x, y_w and y_l are those of an article of docs/theory.md. The reference is SmolLM2-135M-Instruct in float32, the policy
the same model: at the start, where both are equal, and after one AdamW step on this pair at Zhang 2025's learning rate
(§6.2). The answer's tokens are those of the text and of the end token, its log-probability is their sum in nats. The
table is that of docs/dpo.md; everything in it follows from its first four rows.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.data import demo
from trl_ext.dpo.losses import dpo_loss, gradient_weight, implicit_reward, preference_probability


PROMPT = "请介绍一下长城"
CHOSEN = "长城是古代中国为抵御侵略而修筑的军事工程。"
REJECTED = "长城是个墙，在中国。"
BETA = 0.1  # Zhang 2025 §6.2: 0.1 to 0.5
LEARNING_RATE = 1e-6  # Zhang 2025 §6.2


class Pair:
    """The pair under one model."""

    def __init__(self, path: str):
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def tokens(self, answer: str) -> tuple[list[int], list[int]]:
        """The ids of the prompt, and those of the answer with its end token."""
        whole = self.tokenizer(PROMPT + answer + self.tokenizer.eos_token)["input_ids"]
        prompt = self.tokenizer(PROMPT)["input_ids"]  # no token of SmolLM2 reaches over the boundary
        return prompt, whole[len(prompt) :]

    def logps(self) -> Tensor:
        """Step one: log π(y_w|x) and log π(y_l|x), as (2,)."""
        return torch.stack([self._logp(*self.tokens(answer)) for answer in (CHOSEN, REJECTED)])

    def _logp(self, prompt: list[int], answer: list[int]) -> Tensor:
        logits = self.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()

    def step(self, ref_logps: Tensor) -> None:
        """One optimizer step on the loss of the pair."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        chosen, rejected = implicit_reward(self.logps(), ref_logps, BETA)
        dpo_loss(chosen, rejected).backward()
        optimizer.step()


def derive(logps: Tensor, ref_logps: Tensor) -> dict[str, float]:
    """Steps two and three, in float64, from log-probabilities of four decimals."""
    logps, ref_logps = (x.double().round(decimals=4) for x in (logps, ref_logps))
    rewards = implicit_reward(logps, ref_logps, BETA)
    values = {
        "log π_θ(y_w given x)": logps[0],
        "log π_θ(y_l given x)": logps[1],
        "log π_ref(y_w given x)": ref_logps[0],
        "log π_ref(y_l given x)": ref_logps[1],
        "log-ratio of y_w": logps[0] - ref_logps[0],
        "log-ratio of y_l": logps[1] - ref_logps[1],
        "implicit reward r_w": rewards[0],
        "implicit reward r_l": rewards[1],
        "margin": rewards[0] - rewards[1],
        "P(y_w ≻ y_l), Bradley-Terry": preference_probability(*rewards),
        "loss": dpo_loss(*rewards),
        "gradient weight σ(r_l − r_w)": gradient_weight(*rewards),
    }
    return {name: value.item() for name, value in values.items()}


def measure() -> dict[str, dict[str, float]]:
    """Both columns of the table."""
    pair = Pair(str(demo.smollm2()))
    with torch.no_grad():
        ref_logps = pair.logps()
    start = derive(ref_logps, ref_logps)
    pair.step(ref_logps)
    with torch.no_grad():
        return {"at the start": start, "after one step": derive(pair.logps(), ref_logps)}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown: four decimals of what is measured, six of what follows from it."""
    rows = [["quantity", *columns], ["---"] + ["---:"] * len(columns)]
    for name in next(iter(columns.values())):
        decimals = 4 if name.startswith("log") else 6
        rows.append([name, *(f"{column[name]:.{decimals}f}" for column in columns.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(table(measure()))
