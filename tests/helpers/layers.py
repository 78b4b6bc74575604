"""Which modules are pure, and which are public."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]

# The mathematics: torch, the standard library and each other, nothing else. torch.distributed is left out as well:
# a collective enters these files as an argument.
PURE = [
    *("masked.py", "statistics.py", "runs/alarms.py", "runs/convergence.py", "runs/log.py"),
    *("dpo/losses.py", "dpo/metrics.py", "packing/segments.py"),
    *("ppo/advantages.py", "ppo/controllers.py", "ppo/kl.py", "ppo/losses.py", "ppo/rewards.py", "ppo/terms.py"),
]

PURE_MODULES = {"trl_ext." + path.removesuffix(".py").replace("/", ".") for path in PURE}

# All that a script may know of the package. The mathematics is public as it stands, by module.
PUBLIC_MODULES = {
    "trl_ext",
    "trl_ext.callbacks",
    "trl_ext.cli.main",
    "trl_ext.data.conversions",
    "trl_ext.data.demo",
    "trl_ext.data.formats",
    "trl_ext.planner",
    "trl_ext.report",
} | PURE_MODULES
