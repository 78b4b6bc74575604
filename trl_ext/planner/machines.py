"""Find a GPU by what people call it, and the machine that it usually is in."""

import difflib
import re
from dataclasses import replace

from .layout import GIB, Hardware


# Card -> GiB; 16-bit TFLOPs with sums of 32 bits, without sparsity; GB/s from its memory; GB/s to another card each
# way, NVLink or PCIe; GiB of host memory that its usual machine has for each card. Speeds are those of NVIDIA's data
# sheets and architecture papers. Host memory is that of a desktop, of Colab (T4), or, divided by its cards, of the
# smaller ones of the instances that AWS rents with that card (g6, g5, g6e, p4d, p4de, p5, p5en, p6).
CARDS = """
    rtx3050-8gb       8    18   224   16   32
    rtx4060-8gb       8    30   272   16   32
    rtx3070-8gb       8    41   448   32   32
    rtx3080-10gb     10    60   760   32   32
    rtx2080ti-11gb   11    54   616   16   32
    rtx3060-12gb     12    25   360   16   32
    rtx3080ti-12gb   12    68   912   32   32
    rtx4070-12gb     12    58   504   32   32
    rtx4070ti-12gb   12    80   504   32   32
    rtx5070-12gb     12    62   672   64   32
    rtx4060ti-16gb   16    44   288   16   64
    rtx4070tisuper-16gb 16 88   672   32   64
    rtx4080-16gb     16    98   717   32   64
    rtx5060ti-16gb   16    47   448   32   64
    rtx5070ti-16gb   16    88   896   64   64
    rtx5080-16gb     16   113   960   64   64
    t4-16gb          15    65   320   16   12
    rtx3090-24gb     24    71   936   32   64
    rtx3090ti-24gb   24    80  1008   32   64
    rtx4090-24gb     24   165  1008   32   64
    a10g-24gb        22    70   600   32   32
    a10-24gb         24   125   600   32   32
    l4-24gb          22   121   300   32   32
    a5000-24gb       24   111   768   32   64
    rtx5090-32gb     32   210  1792   64   64
    v100-32gb        32   125   900  150   96
    a100-40gb        40   312  1555  300  144
    a6000-48gb       48   155   768   56   96
    a40-48gb         48   150   696   56   64
    rtx6000ada-48gb  48   364   960   32   96
    l40s-48gb        48   362   864   32   64
    a100-80gb        80   312  2039  300  144
    a800-80gb        80   312  2039  200  144
    h100-80gb        80   989  3350  450  256
    h800-80gb        80   989  3350  200  256
    h100nvl-94gb     94   835  3900  300  256
    h20-96gb         96   148  4000  450  256
    gh200-96gb       96   989  4000  450  480
    rtxpro6000-96gb  96   504  1792   64  128
    h200-141gb      139   989  4800  450  256
    b200-180gb      179  2250  8000  900  256
"""
GPUS: dict[str, dict[str, float]] = {
    name: {
        "memory": float(memory) * GIB,
        "flops": float(tera) * 1e12,
        "bandwidth": float(bandwidth) * 1e9,
        "link": float(link) * 1e9,
        "host_for_each": float(host) * GIB,
    }
    for name, memory, tera, bandwidth, link, host in map(str.split, CARDS.strip().splitlines())
}
CPU = Hardware(memory=16 * GIB, flops=1e11, bandwidth=2e10, context=0, fragmentation=0, is_cpu=True)
# What stands in the name of a card beside its model and memory.
_BESIDE = re.compile(
    r"nvidia|geforce|tesla|rtx|blackwell|generation|server|workstation|edition|pcie|sxm\d?|hbm\d\w?|gb|[^a-z0-9]"
)


def _squeezed(name: str) -> str:
    return _BESIDE.sub("", name.lower())


def find_gpu(name: str) -> str | None:
    """
    Return the card of `GPUS` that a name means, with or without its maker and memory: "4090", "RTX 4090", "a100-40",
    "NVIDIA H100 80GB HBM3". Of cards with several sizes, such as the A100, a name without one means the largest; a
    memory alone, "24gb", the first card of the table that has it.
    """
    if re.fullmatch(r"\d+ ?gi?b", name.lower()):
        ending = f"-{re.sub('[^0-9]', '', name)}gb"
        return next((card for card in GPUS if card.endswith(ending)), None)
    for wanted in (_squeezed(name), _squeezed(name).replace("super", "")):  # most are little faster than those without
        for card in reversed(GPUS):
            model, _, memory = card.rpartition("-")
            if wanted in (_squeezed(model), _squeezed(model + memory)):
                return card
    return None


def hardware(gpu: str = "a100-80gb", **options: float) -> Hardware:
    """
    Return the machine with a GPU of the table, overridden by `options`; without `host_memory` among them, the host has
    what is usual for as many cards.
    """
    card = find_gpu(gpu)
    if card is None:
        several = re.fullmatch(r"(\d+) ?[x×*] ?(.+)", gpu.strip().lower())
        if several and find_gpu(several[2]):
            raise ValueError(
                f"{gpu!r} is several GPUs: name one, {several[2]!r}, and give their number, `--gpus {several[1]}` of "
                "`trl-ext plan`."
            )
        near = difflib.get_close_matches(gpu.lower(), GPUS, n=3, cutoff=0.4)
        if re.fullmatch(r"[\d.]+ ?gi?b?", gpu.strip().lower()):  # by a memory that no card of the table has
            near = []
        some = ("rtx4090-24gb", "l40s-48gb", "a100-80gb", "h100-80gb", "b200-180gb")
        first, *others = near or some
        meant = f"Did you mean `--gpu {first}`?" if near else f"It knows {len(GPUS)}: write `--gpu {first}`, say."
        more = f" Others: {', '.join(others)}." if others else ""
        raise ValueError(
            f"The planner does not know the GPU {gpu!r}. {meant}{more} For a card with other memory: `trl-ext plan "
            f"--gpu {first} --gpu_memory 8`."
        )
    machine = Hardware(**(GPUS[card] | {"name": card} | options))  # type: ignore[arg-type]
    return replace(machine, host_for_each=0.0) if "host_memory" in options else machine.with_gpus(machine.gpus)
