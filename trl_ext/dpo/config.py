"""`DPOConfigX`: TRL's `DPOConfig`, with packed rows and a label smoothing that works."""

import difflib
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from trl import DPOConfig

from ..models.precision import computes_in_bf16
from ..models.quantization import QUANTIZATIONS
from ..models.sharding import check_batch_fields
from ..ranges import COUNT, POSITIVE, Range, check_ranges, one_of, require
from ..runs.requirements import check_startable, require_device
from ..runs.saving import SavingOptions, check_saving


LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
TRUNCATIONS = ("keep_start", "keep_end")
# Loss types whose formula has a label smoothing ε in TRL 1.16; for "sigmoid" it is put back here.
SMOOTHED = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}
FLIPPED = Range(
    "in [0, 0.5), a share of flipped labels: at 0.5 the labels say nothing", lambda share: 0 <= share < 0.5
)


@dataclass
class DPOConfigX(SavingOptions, DPOConfig):
    """
    Options of [`DPOTrainerX`]: all of TRL's `DPOConfig`, with the same names and meanings, and those below.

    Without `bf16`, the device decides: bfloat16 on a GPU that has it, float32 on a CPU.

    `label_smoothing` also holds for `loss_type="sigmoid"` (conservative DPO), as in TRL up to 0.24.
    """

    ALGORITHM: ClassVar[str] = "DPO"
    TOPIC: ClassVar[str] = "Packing, the reference, and samples at evaluations"

    packing: bool = field(
        default=True,
        metadata={
            "help": "Put all pairs of a batch into one row, without padding, and compute what a pair's two sequences "
            "have in common once. Where that would not be exact, the trainer uses TRL's rows, and the log says why."
        },
    )
    ref_model_quantization: Annotated[str | None, one_of(*QUANTIZATIONS)] = field(
        default=None,
        metadata={
            "help": "Load the reference in fewer bits, with bitsandbytes: '8bit' or '4bit' (NF4). For a `ref_model` "
            "given by path, or the copy of a policy given by path. The margins are then not 0 before the "
            "first step.",
            "choices": ["8bit", "4bit"],
        },
    )
    generate_during_eval: bool = field(
        default=False,
        metadata={"help": "Show completions of actor and reference side by side at every evaluation."},
    )
    num_eval_samples: Annotated[int, COUNT] = field(
        default=4,
        metadata={"help": "With `generate_during_eval`: how many held-out prompts to complete, from the first on."},
    )
    eval_max_new_tokens: Annotated[int, COUNT] = field(
        default=64, metadata={"help": "With `generate_during_eval`: maximum tokens in a completion."}
    )

    def __post_init__(self):
        check_startable(self)
        if getattr(self, "bf16", None) is None:  # TRL would take bfloat16, on a CPU too
            self.bf16: bool | None = not self.fp16 and computes_in_bf16(self.use_cpu)
        super().__post_init__()
        check_ranges(self)
        check_saving(self)
        unknown = sorted(set(self.loss_type) - set(LOSS_TYPES))
        if unknown:
            near = difflib.get_close_matches(unknown[0], LOSS_TYPES, n=1)
            meant = f" Did you mean `loss_type={near[0]!r}`?" if near else ""
            raise ValueError(f"`loss_type` has unknown values {unknown}.{meant} It may be {', '.join(LOSS_TYPES)}.")
        require(self, "f_divergence_type", self.f_divergence_type in DIVERGENCES, f"one of {DIVERGENCES}")
        require(self, "truncation_mode", self.truncation_mode in TRUNCATIONS, f"one of {TRUNCATIONS}")
        check_batch_fields(self, "`gradient_accumulation_steps`")
        require_device(self)
        needed = "above 0: the implicit reward β·log(π_θ/π_ref) needs a β > 0"
        require(self, "beta", POSITIVE.holds(self.beta), needed)
        if self.neftune_noise_alpha is not None and self.disable_dropout:
            raise ValueError(
                f"`neftune_noise_alpha={self.neftune_noise_alpha}` adds noise to the policy's embeddings in training, "
                "and none to the reference's: the margins would measure it, and `disable_dropout=True` asks for a "
                "policy without noise. Leave it out, or set `disable_dropout=False`, too."
            )
        require(self, "label_smoothing", FLIPPED.holds(self.label_smoothing), FLIPPED.needed)
        if self.label_smoothing > 0 and not SMOOTHED & set(self.loss_type):
            raise ValueError(
                f"`label_smoothing={self.label_smoothing}` changes nothing with `loss_type={self.loss_type}`; it is "
                f"read by {sorted(SMOOTHED)}. Leave it at 0."
            )
        if self.label_smoothing > 0 and "sigmoid" in self.loss_type and self.use_weighting:
            raise ValueError(
                "`label_smoothing` with `loss_type='sigmoid'` is not defined together with `use_weighting=True`: "
                "switch one of them off."
            )
        if self.ref_model_quantization is not None and self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model` copies the policy's weights into the reference, and `ref_model_quantization` leaves "
                "it weights of another form: switch one of them off."
            )
