"""
Ordinary mistakes on the command line, and the page that shows what each is told: `docs/errors.md`, which

    python tests/helpers/wrong_lines.py

writes. `…` stands for a command's usual flags, `USUAL`, of which those that a line gives itself are left out.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model

import tiny
from trl_ext.cli.main import main


PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
USUAL = {
    "dpo": {"model": "my-sft", "dataset_name": "pairs.jsonl", "output_dir": "out"},
    "reward": {"model": "my-sft", "dataset_name": "pairs.jsonl", "output_dir": "out"},
    "critic": {"model": "my-sft", "dataset_name": "prompts.jsonl", "reward_model_path": "my-reward"},
    "ppo": {
        "model": "my-sft",
        "dataset_name": "prompts.jsonl",
        "reward_model_path": "my-reward",
        "response_length": "4",
        "output_dir": "out",
    },
}
# Topic -> lines without `trl-ext`.
LINES = {
    "Commands and flags": """
        rewrad
        convert my-sft
        --config ppo/demo
        dpo … --lerning_rate 1e-5
        dpo … --learning_rate fast
        dpo … --learning_rate
        dpo … --learning_rate -1e-5
        ppo … --learning_rate 1,5e-6
        dpo … --bf16 maybe
        dpo … --bf16
        dpo … --bf16 --fp16 --use_cpu
        dpo … -lora_r 8
        dpo model=my-sft
        ppo ppo/demo
        dpo … some words
        dpo … --optim adamw_8bits
        dpo … --lr_scheduler_type cosin
        ppo … --kl-coeff 0.1
        ppo … --max_prompt_length 512
        ppo … --critic heads
        ppo … --loss_type grpo
        ppo … --steps_per_generation 8
        plan --gpuss 4
        plan my-sft
        plan --method qlor
        chat
        merge my-adapter
        chat my-sft --temprature 1
        chat my-sft --temperature -1
        recipes sft
        completion fish
    """,
    "Values": """
        dpo … --beta 0
        dpo … --loss_type sigmod
        dpo … --label_smoothing 0.7
        dpo … --per_device_train_batch_size 0
        dpo … --max_steps -5
        dpo … --num_train_epochs 0
        dpo … --max_length 0
        dpo … --max_grad_norm -1
        dpo … --save_total_limit 0
        dpo … --save_steps 0
        dpo … --eval_strategy steps --eval_steps -1
        dpo … --seed -1
        dpo … --model_init_kwargs {dtype
        dpo … --lr_scheduler_kwargs min_lr_rate=0.1
        dpo … --lr_scheduler_type cosine_with_min_lr
        dpo … --optim_args momentum
        dpo … --save_strategy best
        dpo … --load_best_model_at_end
        dpo … --load_in_4bit --load_in_8bit --use_peft
        score --model my-sft --ref_model my-sft --dataset_name pairs.jsonl --batch_size 0
        ppo … --kl_estimator k4
        ppo … --gamma 1.5
        ppo … --cliprange -0.2
        ppo … --num_mini_batches 3 --per_device_train_batch_size 4
        ppo … --per_device_train_batch_size 64
        ppo … --response_length 100000
        ppo … --total_episodes 1e5
    """,
    "Recipes": """
        ppo … --config ppo/dmeo
        dpo … --config ppo/demo
        dpo … --config misspelt.yaml
        dpo … --config words.yaml
        dpo … --config maybe.yaml
        dpo … --config sections.yaml
        dpo … --config broken.yaml
        dpo … --config tab.yaml
        dpo … --config list.yaml
        dpo … --config name.yaml
        dpo … --config twice.yaml
        dpo … --config again.yaml
        dpo … --config env.yaml
        plan --from_config nothing
    """,
    "Models and adapters": """
        dpo … --model my-sfft
        dpo … --model outputs/sft
        dpo … --model pairs.jsonl
        dpo … --model empty
        dpo … --model cut-off
        dpo … --model no-tokenizer
        dpo … --model nobody/nothing
        ppo … --model my-reward
        ppo … --reward_model_path my-sft
        ppo … --reward_model_path my-rewrad
        ppo --model my-sft --dataset_name prompts.jsonl
        reward … --model my-adapter
        dpo … --model my-adapter --use_peft
        dpo … --use_peft --lora_target_modules q_prj
        dpo … --use_peft --lora_r 0
        dpo … --use_peft --output_dir my-sft
        dpo … --load_in_4bit
        reward … --model labels
        chat my-rewrad
        chat my-reward
        merge my-sft --output_dir merged
        merge my-adapter --output_dir my-sft
        merge my-adapter --output_dir merged
        score --dataset_name pairs.jsonl
        score --model my-sft --dataset_name pairs.jsonl
        score --model my-sft --ref_model my-sft --dataset_name pairs.jsonl --beta 0
    """,
    "Data": """
        dpo … --dataset_name pair.jsonl
        dpo … --dataset_name pairs.txt
        dpo … --dataset_name my-sft
        dpo … --dataset_name nobody/nothing
        dpo … --dataset_name empty
        dpo … --dataset_name empty.jsonl
        dpo … --dataset_name broken.jsonl
        dpo … --dataset_name one.jsonl
        dpo … --dataset_name prompts.jsonl
        dpo … --dataset_name one_answer.jsonl
        dpo … --dataset_name semicolons.csv
        dpo … --dataset_name latin.csv
        dpo … --dataset_name holes.jsonl
        dpo … --dataset_name numbers.jsonl
        ppo … --dataset_name holes.jsonl
        dpo … --dataset_name good.csv
        dpo … --dataset_name ab.csv
        dpo … --dataset_name good.csv --columns chosen
        dpo … --dataset_name good.csv --columns good_answer=chosen bad_answer=rejected
        dpo … --dataset_name good.csv --columns chosen=god_answer rejected=bad_answer
        dpo … --dataset_train_split trian
        dpo … --test_split_size 2
        dpo … --dataset_streaming
        ppo … --dataset_name questions.csv
    """,
    "Reward functions": """
        ppo … --reward_funcs my_reward
        ppo … --reward_funcs my_functions.py
        ppo … --reward_funcs my_functions.lenght
        ppo … --reward_funcs my_functoins.py:short
        ppo … --reward_funcs needs_numpyy.py:short
        ppo … --reward_funcs my_functions.py:solved
        ppo … --reward_funcs my_functions.py:total
        ppo … --reward_funcs my_functions.py:first_word
        ppo … --reward_funcs get_soft_overlong_punishment
        ppo … --reward_funcs my_functions.py:short --reward_weights 1 2 3
    """,
    "Packages and hardware": """
        dpo … --attn_implementation flash_attention_2
        dpo … --tf32 True
        dpo … --use_liger_kernel
        dpo … --optim galore_adamw
        dpo … --report_to wandb
        dpo … --report_to wandbb
        ppo … --use_vllm
        dpo … --deepspeed zero9.json
        dpo … --accelerate_config zero5 --nproc 2
        dpo … --machine_rank 1
        dpo … --nproc 0
        dpo … --gpu 4090
        dpo … --attn_implementation flash
        dpo … --dry_run --gpu gtx
        plan --model llama-8
        plan --gpu gtx
        plan --gpu_memory -3
        plan --picture costs.txt
    """,
    "Folders": """
        dpo … --output_dir done
        dpo … --output_dir pairs.jsonl
        dpo … --resume_from_checkpoint True
        dpo … --resume_from_checkpoint out/checkpoint-5
        report nothing
        report my-sft
        report done --output page.pdf
        critic … --rollouts nothing
    """,
}
FILES = {
    "misspelt.yaml": "learning_rat: 1e-5\n",
    "words.yaml": "learning_rate: fast\n",
    "broken.yaml": "learning_rate: [1e-5\n",
    "tab.yaml": "model: my-sft\n\tlearning_rate: 1e-5\n",
    "list.yaml": "- learning_rate\n",
    "name.yaml": "learning_rate 1e-5\n",
    "maybe.yaml": "use_peft: maybe\n",
    "sections.yaml": "model: my-sft\ntraining:\n  learning_rate: 1e-5\n",
    "again.yaml": "learning_rate: 1e-5\nbeta: 0.1\nlearning_rate: 1e-6\n",
    "twice.yaml": "model: my-sft\nmodel_name_or_path: my-sft\n",
    "pairs.txt": "good\tbad\n",
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "good film"\n',
    "one.jsonl": '{"prompt": "good film", "chosen": "good", "rejected": "bad"}\n',
    "one_answer.jsonl": '{"instruction": "good film", "output": "good"}\n' * 12,
    "semicolons.csv": "prompt;chosen;rejected\n" + "good film;good;bad\n" * 12,
    "holes.jsonl": "".join(
        json.dumps({"prompt": f"film {i}" * (i != 3), "chosen": "good", "rejected": "bad" if i != 5 else None}) + "\n"
        for i in range(12)
    ),
    "numbers.jsonl": '{"prompt": "good film", "chosen": 8, "rejected": 2}\n' * 12,
    "good.csv": "question,good_answer,bad_answer\n" + "good film,good,bad\n" * 12,
    "ab.csv": "prompt,response_a,response_b\n" + "good film,good,bad\n" * 12,
    "questions.csv": "question,answer\n" + "good film,good\n" * 12,
    "env.yaml": "env: [HF_HOME]\n",
    "done/run.json": "{}",
    "needs_numpyy.py": "import numpyy\n",
    "my_functions.py": (
        "def solved(completions, solution, **kwargs):\n    return [float(s == '4') for s in solution]\n\n"
        "def short(completions, **kwargs):\n    return [-len(text) for text in completions]\n\n"
        "def total(completions, **kwargs):\n    return sum(len(text) for text in completions)\n\n"
        'def first_word(completions, **kwargs):\n    return [len(c["content"].split()[0]) for c in completions]\n'
    ),
}


def workplace(folder: Path) -> None:
    """Put models and data that the lines name into a folder."""
    tiny.save_tiny(folder)
    for name, ours in (("actor", "my-sft"), ("reward_model", "my-reward")):
        (folder / name).rename(folder / ours)
    get_peft_model(tiny.tiny_actor(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        folder / "my-adapter"
    )
    shutil.copytree(folder / "my-sft", folder / "cut-off")
    weights = folder / "cut-off" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    shutil.copytree(folder / "my-sft", folder / "no-tokenizer", ignore=shutil.ignore_patterns("*token*"))
    shutil.copytree(folder / "my-reward", folder / "labels")
    config = json.loads((folder / "labels" / "config.json").read_text(encoding="utf-8"))
    config |= {"id2label": {i: f"LABEL_{i}" for i in range(3)}, "label2id": {f"LABEL_{i}": i for i in range(3)}}
    (folder / "labels" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "latin.csv").write_bytes("prompt,chosen,rejected\ncafé,good,bad\n".encode("cp1252") * 12)
    texts = tiny.tiny_prompts(40)["prompt"]
    Dataset.from_dict({"prompt": texts}).to_json(str(folder / "prompts.jsonl"))
    pairs = [{"prompt": text, "chosen": " good film", "rejected": " bad film"} for text in texts]
    Dataset.from_list(pairs).to_json(str(folder / "pairs.jsonl"))
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def words_of(line: str) -> list[str]:
    """The words of a line, the usual flags in place of `…`."""
    command, *rest = shlex.split(line)
    if rest[:1] != ["…"]:
        return [command, *rest]
    given = {word.removeprefix("--") for word in rest if word.startswith("--")}
    usual = {name: value for name, value in USUAL[command].items() if name not in given}
    return [command, *(word for name, value in usual.items() for word in (f"--{name}", value)), *rest[1:]]


def said_to(line: str) -> str:
    """The last line that a command prints as it refuses; any error but `SystemExit` goes through."""
    with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.redirect_stdout(io.StringIO()):
        try:
            main(words_of(line))
        except SystemExit as end:
            if not end.code:
                raise AssertionError(f"`{line}` is accepted") from end
            text = end.code if isinstance(end.code, str) else printed.getvalue()
            return text.strip().splitlines()[-1]
    raise AssertionError(f"`{line}` is accepted")


def lines() -> Iterator[tuple[str, str]]:
    """Topic and line, in the order of the page."""
    for topic, text in LINES.items():
        yield from ((topic, line.strip()) for line in text.strip().splitlines())


def page(answers: dict[str, str]) -> str:
    """The page, from what each line is told."""
    usual = "\n".join(
        f"- {name}: `{' '.join(f'--{key} {value}' for key, value in flags.items())}`" for name, flags in USUAL.items()
    )
    parts = [HEAD.format(count=len(answers), usual=usual)]
    topic = ""
    for heading, line in lines():
        parts.append(f"## {heading}\n" if heading != topic else "")
        parts.append(f"`trl-ext {line}`\n\n> {escaped(answers[line])}\n")
        topic = heading
    return "\n".join(part for part in parts if part)


def escaped(text: str) -> str:
    """A line as Markdown shows it, outside of code."""
    cells = text.split("`")
    cells[::2] = [cell.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_") for cell in cells[::2]]
    return "`".join(cells)


HEAD = """# What a mistake is told

{count} ordinary mistakes, and the last line that each prints. Nothing is trained, and hardly ever is a model loaded
before it. `--debug`, without a value, shows where in the code an error was raised.

The page is written by the code that checks it (`python tests/helpers/wrong_lines.py`). `…` stands for the usual flags
of the command, of which those in the line itself are left out:

{usual}
"""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        workplace(Path(place))
        os.chdir(place)
        told = {}
        for _, each in lines():
            try:
                told[each] = said_to(each)
            except BaseException as error:
                told[each] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                print(f"{each}\n    {told[each]}", file=sys.stderr)
        PAGE.write_text(page(told), encoding="utf-8")
