"""The model card of a DPO run: the losses with β and label smoothing, the implicit rewards, the preferences."""

from typing import Any

from accelerate.utils import is_peft_model

from ..runs.card import Metric, Training, loading_lines
from .config import DPOConfigX


METRICS = (
    Metric("preference/accuracy", "pairs in the right order (95% interval)", "{:.1%}"),
    Metric("rewards/margins", "margin of the implicit rewards, β · nats", "{:+.3f}"),
    Metric("rewards/chosen", "implicit reward of chosen", "{:+.3f}"),
    Metric("rewards/rejected", "implicit reward of rejected", "{:+.3f}"),
    Metric("loss", "loss", "{:.4f}"),
    Metric("preference/calibration_error", "calibration error"),
    Metric("logps/chosen_drift", "log π_θ − log π_ref of chosen, nats", "{:+.2f}"),
    Metric("logps/rejected_drift", "log π_θ − log π_ref of rejected, nats", "{:+.2f}"),
)
OPTIONS = (
    *("loss_type", "beta", "label_smoothing", "learning_rate", "max_length", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "f_divergence_type"),
)
# Of one pair, as `trl.DPOTrainer` computes them. m is the margin r_w − r_l, ε the label smoothing, Δ̄ the difference of
# the log-ratios per token, ℓ a log-ratio.
SMOOTHED = "−(1 − ε)·log σ(m) − ε·log σ(−m)"
FORMULAS = {
    "sigmoid": "−log σ(m)",
    "hinge": "max(0, 1 − m)",
    "ipo": "(Δ̄ − 1/(2β))²",
    "exo_pair": "σ(m)·(log σ(m) − log(1 − ε)) + σ(−m)·(log σ(−m) − log ε)",
    "nca_pair": "−log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l)",
    "robust": "(−(1 − ε)·log σ(m) + ε·log σ(−m)) / (1 − 2ε)",
    "bco_pair": "−log σ(r_w) − log σ(−r_l)",
    "sppo_hard": "(ℓ_w − 1/(2β))² + (ℓ_l + 1/(2β))²",
    "aot": f"{SMOOTHED}, the margins from sorted log-ratios of the policy and of the reference",
    "aot_unpaired": f"{SMOOTHED}, the margins from sorted log-ratios of chosen and of rejected",
    "apo_zero": "1 − σ(r_w) + σ(r_l)",
    "apo_down": "σ(r_w) + 1 − σ(m)",
    "discopop": "(1 − s)·(−log σ(m)) + s·exp(−m), s = σ(m/τ)",
    "sft": "−log π_θ(y_w), mean over tokens",
    "sigmoid_norm": "−log σ(β·Δ̄)",
}


def dpo_training(trainer: Any) -> Training:
    """Return what a `DPOTrainerX` says about itself."""
    args = trainer.args
    if args.precompute_ref_log_probs:
        reference = "its log-probabilities, computed before training"
    elif trainer.ref_model is None:
        reference = "the base without the adapter that is trained"
    else:
        quantisation = args.ref_model_quantization
        reference = "a frozen model of its own" + (f", {quantisation}" if quantisation else "")
    facts = {name: ", ".join(value) if isinstance(value := getattr(args, name), list) else value for name in OPTIONS}
    return Training(
        trainer="trl_ext.DPOTrainerX",
        facts={"reference": reference} | facts,
        loss=loss_section(args, trainer.loss_weights),
        metrics=METRICS,
        loading=loading_lines("AutoModelForCausalLM", is_peft_model(trainer.model)),
    )


def loss_section(args: DPOConfigX, weights: list[float]) -> str:
    """Return the losses of a pair, the implicit reward, and what β and ε were."""
    kinds = zip(args.loss_type, weights, strict=True)
    formulas = FORMULAS | ({"sigmoid": SMOOTHED} if args.label_smoothing else {})
    rows = [f"| `{kind}` | {weight:g} | {formulas[kind]} |" for kind, weight in kinds]
    smoothing = f", label smoothing ε = {args.label_smoothing:g}" if args.label_smoothing else ""
    divergence = args.f_divergence_type
    other = (
        "" if divergence == "reverse_kl" else f" Log-ratios enter the loss through the f-divergence `{divergence}`."
    )
    return (
        "The optimizer minimised, over pairs of a preferred completion y_w and another one, y_l, with "
        f"β = {args.beta:g}{smoothing}:\n\n| loss type | weight | loss of a pair |\n|---|---:|---|\n"
        + "\n".join(rows)
        + "\n\nThe implicit reward is `r = β·(log π_θ(y|x) − log π_ref(y|x))`, a sum over the tokens of a completion, "
        "and m the margin\n\n"
        "`r_w − r_l = β·[(log π_θ(y_w|x) − log π_ref(y_w|x)) − (log π_θ(y_l|x) − log π_ref(y_l|x))]`"
        f"{other and chr(10) * 2}{other.strip()}"
    )
