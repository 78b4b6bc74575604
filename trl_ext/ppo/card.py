"""The model card of a PPO run: the loss with its coefficients and last values, the critic, the papers to cite."""

from dataclasses import replace
from typing import Any

from accelerate.utils import is_peft_model

from ..runs.card import OUYANG, Metric, Training, loading_lines
from .config import PPOConfigX
from .roles.reward_models import token_scorer
from .terms import TERMS, Term, total_in_words


METRICS = (
    Metric("reward/score", "score", "{:+.3f}"),
    Metric("reward/rise", "rise of the score since the first evaluation", "{:+.3f}"),
    Metric("kl/ref", "KL to the reference, nats per sequence"),
    Metric("completions/mean_length", "tokens per response", "{:.1f}"),
    Metric("completions/clipped_ratio", "responses cut off", "{:.1%}"),
    Metric("terms/entropy", "entropy, nats per token"),
    Metric("policy/clip_fraction", "tokens clipped", "{:.1%}"),
    Metric("value/explained_variance", "explained variance of the critic"),
)
OPTIONS = (
    *("num_ppo_epochs", "num_mini_batches", "learning_rate", "seed", "response_length", "temperature"),
    *("kl_coef", "kl_placement", "kl_estimator", "kl_controller", "old_kl_coef"),
    *("policy_objective", "cliprange", "cliprange_high", "dual_clip", "cliprange_value", "vf_coef", "ent_coef"),
    *("positive_nll_coef", "positive_min_score"),
    *(
        "gamma",
        "lam",
        "lam_alpha",
        "critic_lam",
        "critic_gate",
        "critic_steps",
        "advantage_estimator",
        "whiten_advantages",
    ),
)
GAE = """\
@inproceedings{schulman2016high,
    title     = {{High-Dimensional Continuous Control Using Generalized Advantage Estimation}},
    author    = {John Schulman and Philipp Moritz and Sergey Levine and Michael I. Jordan and Pieter Abbeel},
    booktitle = {4th International Conference on Learning Representations},
    year      = 2016,
    eprint    = {arXiv:1506.02438}
}"""
ZIEGLER = """\
@article{ziegler2019fine,
    title   = {{Fine-Tuning Language Models from Human Preferences}},
    author  = {Daniel M. Ziegler and Nisan Stiennon and Jeffrey Wu and Tom B. Brown and Alec Radford and
               Dario Amodei and Paul Christiano and Geoffrey Irving},
    year    = 2019,
    eprint  = {arXiv:1909.08593}
}"""


def ppo_training(trainer: Any) -> Training:
    """Return what the card says of a `PPOTrainerX`."""
    args = trainer.args
    facts = {
        "critic": f"{args.critic} ({type(trainer.critic).__name__})",
        "rewards": ", ".join(trainer.reward_func_names),
        "prompts per rollout": args.num_prompts,
        "responses per prompt": args.num_generations,
    }
    of_actor = loading_lines("AutoModelForCausalLM", is_peft_model(trainer.model))
    return Training(
        trainer="trl_ext.PPOTrainerX",
        facts=facts | {name: getattr(args, name) for name in OPTIONS},
        loss=loss_section(args, trainer.state.log_history),
        metrics=METRICS,
        loading="\n\n".join([of_actor, trainer.critic.loading_lines]),
        citations=citations(args, any(token_scorer(source) is not None for source in trainer.reward_funcs)),
    )


def loss_section(args: PPOConfigX, log: list[dict[str, Any]]) -> str:
    """Return the section on the loss: of every term its formula, coefficient, last logged value and their product."""
    line: dict[str, Any] = next((line for line in reversed(log) if "loss" in line), {})
    value_range = "" if args.cliprange_value is None else f"V within {args.cliprange_value} of its old value"
    clipping = f"ε = {args.cliprange}"
    clipping += "" if args.cliprange_high is None else f", {args.cliprange_high} above"
    clipping += "" if args.dual_clip is None else f", at least {args.dual_clip} · Â"
    ranges = (
        f"{1 - args.cliprange:g} to {1 + (args.cliprange if args.cliprange_high is None else args.cliprange_high):g}"
    )
    details = {"clip_objective": clipping, "kl": _kl_words(args), "value_loss": value_range}
    coefficients = {term: _coefficient(term, args, line) for term in TERMS}
    shown = [term for term in TERMS if coefficients[term] is not None]
    rows = [_row(term, details.get(term.name, ""), coefficients[term] or 0.0, line) for term in shown]
    if args.policy_objective == "mask":
        masked = replace(shown[0], formula="ratio · Â within a range of the ratio, 0 elsewhere")
        rows[0] = _row(masked, f"from {ranges}", coefficients[shown[0]] or 0.0, line)
    total = f"`loss` was {line['loss']:+.4f} at step {line['step']}. " if line else ""
    lam = f"{args.lam}" if args.lam_alpha is None else f"1 − 1 / ({args.lam_alpha} · length)"
    lam += "" if args.critic_lam is None else f", {args.critic_lam} for the critic's returns"
    whitened = "whitened over all ranks" if args.whiten_advantages else "not whitened"
    return (
        f"The optimizer minimised\n\n`{total_in_words(shown)}`\n\n"
        "| term | what it is | coefficient | last value | contribution |\n|---|---|---:|---:|---:|\n"
        + "\n".join(rows)
        + f"\n\n{total}Advantages Â: `{args.advantage_estimator}`, γ = {args.gamma}, λ = {lam}, {whitened}."
    )


def _coefficient(term: Term, args: PPOConfigX, line: dict[str, Any]) -> float | None:
    """Return the signed coefficient in the log line, else that of the options; `None` for a term not in use."""
    if not term.coefficient:
        return term.sign
    coefficient = line.get(f"coef/{term.coefficient}", getattr(args, term.option, None))
    if coefficient is None or (term.optional and coefficient == 0):
        return None
    return term.sign * coefficient


def _row(term: Term, detail: str, coefficient: float, line: dict[str, Any]) -> str:
    value = line.get(f"terms/{term.name}")
    shown = ("", "") if value is None else (f"{value:.5g}", f"{coefficient * value:+.5f}")
    what = f"{term.formula}, {term.unit}{', maximised' if term.maximised else ''}{detail and f'; {detail}'}"
    return f"| `{term.name}` | {what} | {coefficient:g} | {shown[0]} | {shown[1]} |"


def _kl_words(args: PPOConfigX) -> str:
    where = "in the loss" if args.kl_placement == "loss" else "in the reward of each token, not in the loss"
    controllers = {
        "fixed": "a fixed coefficient",
        "proportional": f"the coefficient follows a target of {args.kl_target} nats per sequence",
        "band": f"the coefficient keeps it within {args.kl_band[0]} to {args.kl_band[1]} nats per sequence",
    }
    return f"{where}, estimator {args.kl_estimator}, {controllers[args.kl_controller]}"


def citations(args: PPOConfigX, has_reward_model: bool) -> tuple[str, ...]:
    """Return the papers whose methods a run used, except PPO's own, which TRL's card cites."""
    used = {
        GAE: args.advantage_estimator == "gae",
        ZIEGLER: args.kl_controller == "proportional" or args.kl_placement == "reward",
        OUYANG: has_reward_model,
    }
    return tuple(entry for entry, is_used in used.items() if is_used)
