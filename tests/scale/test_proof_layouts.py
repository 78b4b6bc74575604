"""
Every DeepSpeed file, and what accelerate makes of its own files, trains PPO and DPO in two processes on the CPU.

Left out are the files of several machines, whose processes are those of zero3.yaml (test_launch_files.py), and
zero2.yaml, which the default tests run.
"""

import json
import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import layout_worker
import tiny
import two_processes
import zero_runs
from accelerate_files import ACCELERATE, launch
from trl_ext.planner import Hardware, Layout, memory, model_shape
from trl_ext.planner.shapes import adapter_shape


# accelerate and DeepSpeed import half of their optional dependencies; torch warns of saved adapters' base models.
pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]

DEEPSPEED = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3, "ppo_33b_4x80g": 3, "dpo_33b_2x80g": 3}
OFFLOADS = {"zero3_offload": (True, True), "ppo_33b_4x80g": (True, True), "dpo_33b_2x80g": (True, False)}
# File in configs/accelerate: the stage that it must give, 0 for none.
LAUNCHED = {"ddp": 0, "zero3": 3, "zero3_offload": 3, "fsdp2": 0}
STEPS = layout_worker.OPTIONS["max_steps"]
# DPO completes held-out prompts after its last step, by weights that differ visibly from the reference's.
COMPLETES = {
    "eval_strategy": "steps",
    "eval_steps": STEPS,
    "generate_during_eval": True,
    "num_eval_samples": 3,
    "eval_max_new_tokens": 5,
    "learning_rate": 0.1,
}


def layouts() -> dict[str, dict]:
    """Every layout, by a name that begins with its file's."""
    directly = {"ACCELERATE_USE_DEEPSPEED": "true"}
    made = {}
    for name in DEEPSPEED:
        options = {"deepspeed": f"configs/deepspeed/{name}.json"}
        made[f"{name}.json"] = {"environment": directly, "options": options}
    for name in LAUNCHED:
        environment = launch(ACCELERATE / f"{name}.yaml", "--num_processes", "2").environment
        made[f"{name}.yaml"] = {"environment": environment, "options": {}}
    made["fsdp2.yaml"] |= {"dpo": COMPLETES}
    made["fsdp2.yaml, LoRA"] = made["fsdp2.yaml"] | {"adapter": True, "ppo": {"critic": "head"}}
    for name in ("zero2", "zero3"):
        made[f"{name}.json, LoRA"] = made[f"{name}.json"] | {"adapter": True}
    zero3 = made["zero3.json"]
    for name in ("zero3.json", "zero3.json, LoRA"):
        made[f"{name}, bf16"] = made[name] | {"options": zero3["options"] | {"bf16": True}}
    of_dpo = made["dpo_33b_2x80g.json"]
    precomputed = {"options": of_dpo["options"] | {"precompute_ref_log_probs": True}, "only": "dpo"}
    made["dpo_33b_2x80g.json, precomputed"] = of_dpo | precomputed
    for name in ("zero2.json", "zero3.json"):
        quantized = {"options": made[name]["options"] | {"critic": "head", "bf16": True}, "only": "ppo"}
        made[f"{name}, QLoRA"] = made[f"{name}, LoRA"] | quantized | {"quantized": True}
        warmup = {
            "options": made[name]["options"] | {"critic_warmup_steps": STEPS, "weight_decay": 0.1},
            "only": "ppo",
        }
        made[f"{name}, warm-up"] = made[name] | warmup
    for name in ("ddp.yaml", "zero2.json", "zero3.json", "zero3_offload.json"):
        of_critic = {"options": made[name]["options"] | {"critic_steps": 2}, "only": "ppo"}
        made[f"{name}, critic steps"] = made[name] | of_critic
    best = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward/score",
    }
    made["zero3.json, best"] = zero3 | {"options": zero3["options"] | best, "only": "ppo"}
    made["fsdp2.yaml, best"] = made["fsdp2.yaml"] | {"options": best | {"bf16": True}, "only": "ppo"}
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    zero_runs.save(folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    return two_processes.measured(layout_worker.measure, folder, layouts(), timeout=1500)


def elements(model) -> list[int]:
    return [parameter.numel() for parameter in model.parameters()]


# The models that a run holds, counted here, not by the run.
ACTOR, CRITIC = elements(tiny.tiny_actor()), elements(tiny.tiny_reward_model())
STAGES = {f"{name}.json": stage for name, stage in DEEPSPEED.items()}
STAGES |= {f"{name}.yaml": stage for name, stage in LAUNCHED.items()}
RUNS = [(name, algorithm) for name in STAGES for algorithm in ("ppo", "dpo")]


def share(sizes: list[int]) -> int:
    """Elements on each of two processes: ZeRO-3 cuts every tensor in two."""
    return sum(math.ceil(size / 2) for size in sizes)


def rows_of_half(model: Any) -> int:
    """Elements on the first of two processes: FSDP2 cuts between rows, of which a score head has one."""
    return sum(math.ceil(len(parameter) / 2) * parameter[0].numel() for parameter in model.parameters())


@pytest.mark.parametrize("name, algorithm", RUNS)
def test_layout_trains(measured, name, algorithm):
    run = measured[f"{name}, {algorithm}"]
    assert run["steps"] == len(run["loss"]) == STEPS
    assert all(map(math.isfinite, run["loss"]))
    assert run["still"] == []
    assert run["moved though frozen"] == []
    assert run["reference"]


@pytest.mark.parametrize("name, algorithm", RUNS)
def test_layout_is_the_one_that_the_file_names(measured, name, algorithm):
    """The wrapper, the stage, and the elements that one of two processes keeps of each model and of the optimizer."""
    run, stage = measured[f"{name}, {algorithm}"], STAGES[name]
    if name == "fsdp2.yaml":
        assert run["wrapper"] == "FSDPLlamaForCausalLM"
    else:
        assert run["wrapper"] == ("DeepSpeedEngine" if stage else "DistributedDataParallel")
    trained = ACTOR + CRITIC if algorithm == "ppo" else ACTOR
    models = {"trained": trained, "reference": ACTOR}
    models |= {"critic": CRITIC, "reward": CRITIC} if algorithm == "ppo" else {}
    expected = {role: [share(sizes) if stage == 3 else sum(sizes), sum(sizes)] for role, sizes in models.items()}
    if name == "fsdp2.yaml":
        actor, critic = rows_of_half(tiny.tiny_actor()), rows_of_half(tiny.tiny_reward_model())
        halves = {"trained": actor + critic * (algorithm == "ppo"), "reference": actor}
        halves |= {"critic": critic, "reward": critic}
        expected = {role: [halves[role], whole] for role, (_, whole) in expected.items()}
    assert run["elements"] == expected
    if stage:
        assert (run["stage"], run["reference wrapper"]) == (stage, "DeepSpeedEngine")
        # Flat shares are padded, to a multiple of a few elements.
        assert share(trained) - 16 <= run["optimizer elements"] <= share(trained) + 64
        optimizer, parameters = OFFLOADS.get(name.split(".")[0], (False, False))
        assert ["cpu" in where for where in run["offloads"]] == [optimizer, parameters]
        assert run["optimizer"] == ("DeepSpeedCPUAdam" if optimizer else "AdamW")


@pytest.mark.parametrize("name, algorithm", RUNS)
def test_saved_model_is_the_trained_one_and_generates(measured, folder, name, algorithm):
    output, weights = folder / name / algorithm, measured[f"{name}, {algorithm}"]["weights"]
    actor, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    of_critic = {key.removeprefix("critic.model."): w for key, w in weights.items() if key.startswith("critic.")}
    same_weights(actor, {key: w for key, w in weights.items() if not key.startswith("critic.")})
    if algorithm == "ppo":
        same_weights(AutoModelForSequenceClassification.from_pretrained(output / "critic"), of_critic)
    else:
        assert not of_critic
    batch = tokenizer("the cat is", return_tensors="pt", return_token_type_ids=False)
    assert actor.generate(**batch, min_new_tokens=4, max_new_tokens=4).shape == (1, 7)


def same_weights(model, expected):
    """All of them, and under their own names; what is shared between two names is one parameter."""
    saved = dict(model.named_parameters())
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name].detach(), weight, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ["ppo", "dpo"])
@pytest.mark.parametrize("name", ["zero2.json, LoRA", "zero3.json, LoRA"])
def test_saved_adapter_is_the_trained_one_and_generates(measured, folder, name, algorithm):
    run = measured[f"{name}, {algorithm}"]
    assert run["wrapper"] == "DeepSpeedEngine"
    assert run["still"] == []
    assert run["moved though frozen"] == []
    assert not run["reference"], "the reference is the actor without its adapter"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "actor"), folder / name / algorithm
    )
    trained = {key: weight for key, weight in run["weights"].items() if ".critic." not in key}
    same_weights(model, trained)
    assert any("lora_B" in key and weight.any() for key, weight in trained.items())
    batch = tiny.tiny_tokenizer()("the cat is", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**batch, min_new_tokens=4, max_new_tokens=4).shape == (1, 7)


@pytest.mark.parametrize("name", layout_worker.WITHOUT_KL)
def test_reference_is_not_loaded_without_a_kl(measured, name):
    """Of four models given as paths, three are loaded."""
    assert measured[f"{name}, ppo"]["without kl"] == ["actor", "reward_model", "critic"]


@pytest.mark.parametrize("name", ["zero3.json, best", "fsdp2.yaml, best"])
def test_best_model_of_shares_is_actor_and_critic_of_that_step(measured, folder, name):
    """Saved after two of three steps: what is loaded back, in both, is what was saved then."""
    run, output = measured[f"{name}, ppo"], folder / name / "ppo"
    assert run["best"] == "checkpoint-2"
    of_critic = {key.removeprefix("critic.model."): w for key, w in run["weights"].items() if "critic." in key}
    same_weights(AutoModelForSequenceClassification.from_pretrained(output / run["best"] / "critic"), of_critic)
    of_actor = {key: weight for key, weight in run["weights"].items() if "critic." not in key}
    same_weights(AutoModelForCausalLM.from_pretrained(output / run["best"]), of_actor)


@pytest.mark.parametrize("name", ["zero2.json, QLoRA", "zero3.json, QLoRA"])
def test_adapter_on_a_quantized_base_trains(measured, name):
    """Under ZeRO-3 the packed base is shared out as well."""
    run = measured[f"{name}, ppo"]
    local, whole = run["elements"]["trained"]
    assert (run["steps"], run["still"], run["moved though frozen"]) == (STEPS, [], [])
    assert run["stage"] == int(name[4])
    assert whole < sum(elements(tiny.tiny_actor(hidden_size=64, intermediate_size=128))), "two weights are one byte"
    assert local == whole if run["stage"] == 2 else whole / 2 <= local <= whole / 2 + 64


@pytest.mark.parametrize("name", ["zero2.json, warm-up", "zero3.json, warm-up"])
def test_warmup_of_the_critic_leaves_the_actor_bitwise(measured, name):
    run = measured[f"{name}, ppo"]
    assert {*run["still"]} == {key for key in run["weights"] if not key.startswith("critic.")}


@pytest.mark.parametrize(
    "name", ["zero2.json, critic steps", "zero3.json, critic steps", "zero3_offload.json, critic steps"]
)
def test_extra_steps_of_the_critic_leave_actor_and_adam_bitwise(measured, name):
    """All of the critic moves; of the optimizer's states none of the actor's does. The run is that of DDP."""
    run = measured[f"{name}, ppo"]
    of_critic = {key for key in run["weights"] if key.startswith("critic.")}
    assert len(run["moved by the critic's steps"]) == run["steps"] == STEPS
    for moved in run["moved by the critic's steps"]:
        assert {*moved["weights"]} == of_critic
        assert moved["states"] == ["critic"]
    assert run["still"] == []
    without_zero = measured["ddp.yaml, critic steps, ppo"]
    for key, weight in without_zero["weights"].items():
        assert (run["weights"][key] - weight).norm() < 1e-5 * weight.norm(), key
    for line, other in zip(run["norms"], without_zero["norms"], strict=True):
        assert line == pytest.approx(other, rel=1e-4)
        assert line["grad_norm"] ** 2 == pytest.approx(line["actor"] ** 2 + line["critic"] ** 2, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["ppo", "dpo"])
@pytest.mark.parametrize("name", ["zero3.json, bf16", "zero3.json, LoRA, bf16"])
def test_zero3_trains_in_bfloat16(measured, name, algorithm):
    """As it does on a GPU: the weights are in bfloat16, the optimizer's copy in float32."""
    run = measured[f"{name}, {algorithm}"]
    assert run["steps"] == STEPS
    assert all(map(math.isfinite, run["loss"]))
    assert {weight.dtype for weight in run["weights"].values()} == {torch.bfloat16}
    assert run["moved though frozen"] == []


def test_fsdp_does_not_round_log_probabilities_to_bfloat16(measured):
    """As accelerate would have it round whatever a model returns."""
    run = measured["fsdp2.yaml, best, ppo"]
    assert run["log-probabilities"] == "torch.float32"
    assert {weight.dtype for weight in run["weights"].values()} == {torch.float32}, "of what learns"


def planned_of_fsdp(name: str, algorithm: str) -> dict[str, dict[str, float]]:
    """What `memory` says that a process of two holds of what learns, at the moments that the runs measure."""
    adapted, config = "LoRA" in name, tiny.tiny_config()
    actor = model_shape(config)
    critic = model_shape(config, with_score=True) if algorithm == "ppo" and not adapted else None
    adapter = adapter_shape(config, 2, layout_worker.LORA["target_modules"]) if adapted else None
    layout = Layout("ppo", compute="fp32", fsdp=True, accumulation=2, method="lora" if adapted else "full")
    two = Hardware(gpus=2)
    learned = [adapter.learned if adapter else actor.learned, *([critic.learned] if critic else [])]
    bases = [4 * actor.parameters if adapter else 0, 0]
    states = [memory.trained_states(base, each, 4, layout, two) for base, each in zip(bases, learned, strict=False)]
    step = {part: sum(getattr(each, part) for each in states) for part in ("weights", "gradients", "optimizer")}
    whole = sum(memory.accumulated_gradients(each.parameters, layout) for each in learned)
    planned = {"step": step, "between": step | {"gradients": whole}}
    if algorithm == "ppo":
        gathered = memory.gathered_to_generate(actor, adapter, critic, layout)
        planned["generate"] = step | {"gradients": 0, "gathered": gathered}
    return planned


@pytest.mark.parametrize("algorithm", ["ppo", "dpo"])
@pytest.mark.parametrize("name", ["fsdp2.yaml", "fsdp2.yaml, LoRA"])
def test_process_of_fsdp_holds_what_is_planned(measured, name, algorithm):
    """Of weights, gradients and states, at a step, between micro-batches and while a rollout is sampled."""
    held, planned = measured[f"{name}, {algorithm}"]["held"], planned_of_fsdp(name, algorithm)
    assert held.keys() == planned.keys()
    row = 4 * (tiny.tiny_config().hidden_size + 1)  # of a value head, of which the first process has all; and a bias
    for moment, parts in planned.items():
        for part, expected in parts.items():
            count = 2 if part == "optimizer" else 1
            assert held[moment][part] == pytest.approx(expected, rel=0.02, abs=count * row), (moment, part)


@pytest.mark.parametrize("algorithm", ["ppo", "dpo"])
def test_no_whole_copy_of_what_fsdp_shards_stays(measured, algorithm):
    """Nothing keeps the weights with which the run was built."""
    whole = 4 * sum(ACTOR + (CRITIC if algorithm == "ppo" else []))
    for held in measured[f"fsdp2.yaml, {algorithm}"]["held"].values():
        assert held["other"] < whole / 4


@pytest.mark.parametrize("name", ["fsdp2.yaml", "fsdp2.yaml, LoRA"])
def test_prompts_that_dpo_completes_under_fsdp_are_completed_by_its_weights(measured, folder, name):
    """As one process does with the actor that is saved, and with the one from which the run began."""
    output, tokenizer = folder / name / "dpo", tiny.tiny_tokenizer()
    models = {role: AutoModelForCausalLM.from_pretrained(folder / "actor") for role in ("actor", "reference")}
    if "LoRA" in name:
        models["actor"] = PeftModel.from_pretrained(models["actor"], output)
    else:
        models["actor"] = AutoModelForCausalLM.from_pretrained(output)
    (written,) = (output / "completions").glob("*.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == COMPLETES["num_eval_samples"]
    for row in rows:
        batch = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        for role, model in models.items():
            ids = model.generate(**batch, do_sample=False, max_new_tokens=COMPLETES["eval_max_new_tokens"])
            assert row[role] == tokenizer.decode(ids[0, batch["input_ids"].size(1) :], skip_special_tokens=True)
    assert any(row["actor"] != row["reference"] for row in rows)


def test_reference_of_dpo_is_gone_once_it_is_precomputed(measured):
    run = measured["dpo_33b_2x80g.json, precomputed, dpo"]
    assert (run["steps"], run["reference"], run["stage"]) == (STEPS, False, 3)
    first = measured["dpo_33b_2x80g.json, dpo"]["loss"]
    assert run["loss"] == pytest.approx(first, abs=1e-5), "the same reference, computed before"
