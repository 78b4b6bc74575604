"""Count the bytes that an optimizer keeps of what it trains, for every name of transformers' `optim`."""

from dataclasses import dataclass


# How a state is kept -> states of each parameter -> optimizers. GaLore and APOLLO keep those of a projected gradient,
# which are fewer than the AdamW's that are counted, unless the rank is larger than the layers. LOMO keeps none;
# GrokAdamW keeps its own in host memory. StableAdamW has a third for 16-bit weights.
KEPT = {
    "as the weight": {
        0: "sgd lomo grokadamw",
        1: "adagrad rmsprop schedule_free_sgd galore_adafactor galore_adafactor_layerwise",
        2: "adamw adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused schedule_free_radam "
        "schedule_free_adamw galore_adamw galore_adamw_layerwise apollo_adamw apollo_adamw_layerwise",
        3: "stable_adamw",
    },
    "32 bits": {
        1: "lion_32bit paged_lion_32bit rmsprop_bnb rmsprop_bnb_32bit",
        2: "paged_adamw_32bit adamw_anyprecision",
        3: "ademamix paged_ademamix_32bit",
    },
    "8 bits": {
        1: "lion_8bit paged_lion_8bit rmsprop_bnb_8bit",
        2: "adamw_8bit adamw_bnb_8bit paged_adamw_8bit galore_adamw_8bit galore_adamw_8bit_layerwise",
        3: "ademamix_8bit paged_ademamix_8bit",
    },
    "8 bits of torchao": {2: "adamw_torch_8bit"},
    "4 bits of torchao": {2: "adamw_torch_4bit"},
    "factored": {1: "adafactor adalomo"},
}
OPTIMIZERS = {
    name: (states, kept) for kept, of in KEPT.items() for states, names in of.items() for name in names.split()
}
# A scale of 32 bits for each 256 values.
SCALE = 4 / 256


@dataclass(frozen=True)
class Learned:
    """Counts of what is trained."""

    parameters: int
    # Those of which bitsandbytes keeps 32 bits even if it keeps 8 of the others: tensors of less than 4096 elements,
    # and embeddings, for which transformers asks.
    in_32_bits: int = 0
    factored: int = 0  # elements of Adafactor's second moment: a row and a column of each matrix, all of a vector

    def __add__(self, other: "Learned") -> "Learned":
        in_32_bits, factored = self.in_32_bits + other.in_32_bits, self.factored + other.factored
        return Learned(self.parameters + other.parameters, in_32_bits, factored)


def state_bytes(optimizer: str, learned: Learned, size: int) -> float:
    """Return the bytes of an optimizer's states; `size` is that of one trained weight."""
    states, kept = OPTIMIZERS[optimizer]
    of_state = {
        "as the weight": size * learned.parameters,
        "32 bits": 4 * learned.parameters,
        "8 bits": (1 + SCALE) * (learned.parameters - learned.in_32_bits) + 4 * learned.in_32_bits,
        "8 bits of torchao": (1 + SCALE) * learned.parameters,
        "4 bits of torchao": (0.5 + SCALE) * learned.parameters,
        "factored": 4 * learned.factored,
    }
    return states * of_state[kept]
