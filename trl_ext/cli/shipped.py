"""
Help texts and the completion script that come with the package, in `shipped/`: to make them, torch, transformers and
TRL are imported, for seconds. `python tests/helpers/shipped_texts.py` writes them.
"""

import ast
import hashlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


FOLDER = Path(__file__).parent / "shipped"
PACKAGE = Path(__file__).resolve().parents[1]
# Package -> its files whose declarations the texts show.
SHOWN = {
    "trl_ext": "cli/main.py cli/data.py cli/launch.py cli/models.py cli/topics.py cli/commands/*.py ppo/options.py "
    "ppo/config.py ppo/config_checks.py ppo/kl.py ppo/pretraining.py ppo/terms.py dpo/config.py reward/config.py "
    "runs/saving.py models/quantization.py planner/layout.py",
    "trl": "trainer/base_config.py trainer/dpo_config.py trainer/grpo_config.py trainer/model_config.py "
    "trainer/reward_config.py scripts/utils.py",
    "transformers": "training_args.py",
}
FUSED = (2, 8)  # the first torch for which transformers' default optimizer is the fused one


def shipped(name: str) -> str | None:
    """Return a text; `None` if there is none, or if what it shows has changed since it was made."""
    file = FOLDER / f"{name}.txt"
    if not file.is_file() or (FOLDER / "stamp").read_text(encoding="utf-8").strip() != stamp():
        return None
    return file.read_text(encoding="utf-8")


def stamp() -> str:
    """Return what changes with the options that are installed, and with no other code; nothing is imported."""
    facts = [str(tuple(map(int, version("torch").split(".")[:2])) >= FUSED)]
    facts += sorted(f"{path.parent.name}/{path.stem}" for path in (PACKAGE / "configs").glob("*/*.yaml"))
    for package, files in SHOWN.items():
        spec = find_spec(package)
        root = PACKAGE if package == PACKAGE.name or spec is None else Path(str(spec.origin)).parent
        facts += [declared(path) for name in files.split() for path in sorted(root.glob(name))]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def declared(path: Path) -> str:
    """Return the declarations of a file: docstring, constants, fields of classes, and functions named `arguments`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    kept: list[ast.AST] = [ast.Constant(ast.get_docstring(tree))]
    kept += [node for body in (tree.body, *(each.body for each in classes)) for node in body if _declares(node)]
    return "\n".join(map(ast.unparse, kept))


def _declares(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign | ast.AnnAssign) or (
        isinstance(node, ast.FunctionDef) and node.name == "arguments"
    )
