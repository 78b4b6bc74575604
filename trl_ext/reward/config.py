"""`RewardConfigX`: TRL's `RewardConfig`, with packed pairs."""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import RewardConfig

from ..models.precision import computes_in_bf16
from ..ranges import check_ranges
from ..runs.requirements import check_startable, require_device
from ..runs.saving import SavingOptions, check_saving


@dataclass
class RewardConfigX(SavingOptions, RewardConfig):
    """Options of [`RewardTrainerX`]: all of TRL's `RewardConfig`, with the same names and meanings, and more."""

    ALGORITHM: ClassVar[str] = "reward training"
    TOPIC: ClassVar[str] = "Packing"

    packing: bool = field(
        default=True,
        metadata={
            "help": "Put all pairs of a batch into one row, without padding, and compute what a pair's two sequences "
            "have in common once. Where that would not be exact, the trainer uses TRL's rows, and the log says why."
        },
    )

    def __post_init__(self) -> None:
        check_startable(self)
        if getattr(self, "bf16", None) is None:  # TRL would take bfloat16, on a CPU too
            self.bf16: bool | None = not self.fp16 and computes_in_bf16(self.use_cpu)
        super().__post_init__()
        check_ranges(self)
        check_saving(self)
        require_device(self)
