"""Write the sections of a reward model's card."""

from typing import Any

from accelerate.utils import is_peft_model
from trl import is_conversational

from ..runs.card import OUYANG, Metric, Training, loading_lines


BRADLEY = """\
@article{bradley1952rank,
    title   = {{Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons}},
    author  = {Ralph Allan Bradley and Milton E. Terry},
    journal = {Biometrika},
    volume  = 39,
    number  = {3/4},
    year    = 1952
}"""
METRICS = (
    Metric("accuracy", "pairs in the right order", "{:.1%}"),
    Metric("margin", "margin of the scores", "{:+.3f}"),
    Metric("loss", "loss, nats", "{:.4f}"),
)
WORDS = {
    "This model was trained with Reward.": "This is a reward model: it scores answers.",
    "pipeline(model=": 'pipeline("text-classification", model=',  # a folder does not say its task
}
# The quick start of TRL's card scores a plain text, which a reward model of chats has not learnt from.
CHATS = {
    'text = "The capital of France is Paris."\n': (
        'chat = [{"role": "user", "content": "What is the capital of France?"}, '
        '{"role": "assistant", "content": "Paris."}]\n'
    ),
    "output = rewarder(text)[0]": (
        "text = rewarder.tokenizer.apply_chat_template(chat, tokenize=False)\n"
        "output = rewarder(text, add_special_tokens=False)[0]"
    ),
}
LOSS = """The optimizer minimised the negative log-likelihood of Bradley and Terry's model of preferences,

`loss = −log σ(s(x, y_w) − s(x, y_l){margin}){centering}`

for the scores s of the preferred completion y_w and of the other one, y_l.{purpose}"""


def reward_training(trainer: Any) -> Training:
    """Return the sections of the card of a `trl.RewardTrainer`."""
    args, columns = trainer.args, trainer.train_dataset.column_names or ()
    centering = args.center_rewards_coefficient
    return Training(
        trainer="trl_ext.RewardTrainerX",
        facts={name: getattr(args, name) for name in ("learning_rate", "max_length", "seed")},
        loss=LOSS.format(
            margin=" − margin" if "margin" in columns else "",
            centering=f" + {centering} · (s(x, y_w) + s(x, y_l))²" if centering else "",
            purpose=" The second term keeps the mean score near 0." if centering else "",
        ),
        metrics=METRICS,
        loading=loading_lines("AutoModelForSequenceClassification", is_peft_model(trainer.model), "num_labels=1"),
        citations=(BRADLEY, OUYANG),
        task="text-classification",
        rewording=WORDS | (CHATS if _reads_chats(trainer.train_dataset) else {}),
    )


def _reads_chats(rows: Any) -> bool:
    """Return whether the pairs are conversations; TRL keeps their columns beside the tokens."""
    first: dict[str, Any] = next(iter(rows), {})
    return {"chosen", "rejected"} <= set(first) and is_conversational(first)
