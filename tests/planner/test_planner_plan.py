"""Plans as a whole: who holds what in which phase, what fits, what would make it fit, and how fast it is."""

import dataclasses
import re

import pytest

import tiny
from trl_ext import planner
from trl_ext.planner import GIB, Hardware, Layout, ModelNames, plan, smallest_change, speed, suggest, timing
from trl_ext.planner.catalogue import load_config
from trl_ext.planner.changes import changes
from trl_ext.planner.machines import find_gpu
from trl_ext.planner.search import layouts
from trl_ext.planner.shapes import adapter_shape


pytestmark = pytest.mark.filterwarnings("ignore")  # of bitsandbytes and PEFT when they are imported

GPU = Hardware(memory=80 * GIB)
FULL = Layout(prompt=256, response=256, rollout=8, accumulation=8)
DPO = Layout(trainer="dpo", critic="none", reward="none")
ON_ONE_BASE = FULL.change(method="qlora", compute="bf16", critic="head", reward="adapter", reference="adapter")


def phase(planned, name):
    return next(p for p in planned.phases if p.name == name)


def test_ppo_has_three_phases_and_dpo_one():
    assert [p.name for p in plan("0.5b", FULL, GPU).phases] == ["generate", "score", "learn"]
    dpo = Layout(trainer="dpo", critic="none", reward="none")
    assert [p.name for p in plan("0.5b", dpo, GPU).phases] == ["learn"]


def test_states_of_full_training_are_sixteen_bytes_a_parameter():
    """Rajbhandari et al. 2020, §3.1, of float32 training: 4 bytes each of weight and gradient, 8 of moments."""
    planned = plan("0.5b", FULL, GPU)
    actor = phase(planned, "learn").roles["actor"]
    number = planned.models.actor.parameters
    assert actor.weights == 4 * number
    assert actor.optimizer == 8 * number
    assert actor.gradients >= 4 * number
    assert phase(planned, "learn").roles["critic"].optimizer == 8 * planned.models.critic.parameters


def test_gradients_are_gone_while_the_others_work_but_moments_are_not():
    planned = plan("0.5b", FULL, GPU)
    for name in ("generate", "score"):
        actor = phase(planned, name).roles["actor"]
        assert actor.gradients == 0
        assert actor.optimizer == 8 * planned.models.actor.parameters


@pytest.mark.parametrize(
    "change, absent",
    [
        ({"reference": "none"}, "reference"),
        ({"reward": "none"}, "reward"),
        ({"method": "lora", "compute": "bf16", "reference": "adapter"}, "reference"),  # the actor without its adapter
    ],
)
def test_role_without_weights_holds_none(change, absent):
    planned = plan("0.5b", FULL.change(**change), GPU)
    assert absent not in phase(planned, "learn").roles
    assert "method" in change or all(absent not in p.roles for p in planned.phases)


def test_critic_that_is_a_head_holds_a_head():
    assert phase(plan("0.5b", FULL.change(critic="head"), GPU), "learn").roles["critic"].weights == 4 * (896 + 1)


REWARD = Layout(trainer="reward", critic="none", reward="none", reference="none")


def test_reward_run_holds_a_scorer_and_no_logits():
    planned = plan("8b", REWARD.change(method="lora", compute="bf16"), GPU)
    (learn,) = planned.phases
    assert learn.roles.keys() == {"actor"}
    assert learn.roles["actor"].logits == 0
    assert planned.models.actor.head == 4096
    assert learn.total < plan("8b", DPO.change(method="lora", compute="bf16", reference="none"), GPU).peak.total
    text = planner.plan_text(planned)
    assert text.startswith("REWARD: model (lora) 8b 7.505B")
    assert "| model " in text
    assert not re.search("actor|critic|LM head", text)
    assert {p.layout.method for p in suggest("1.5b", REWARD, GPU)} == {"full", "lora", "qlora"}


def test_roles_on_one_base_hold_it_once():
    planned = plan("8b", ON_ONE_BASE, GPU)
    base = 0.5625 * planned.models.actor.linear + 2 * (planned.models.actor.parameters - planned.models.actor.linear)
    adapter = adapter_shape("8b", 16, "all-linear").parameters
    held = sum(usage.weights for usage in phase(planned, "learn").roles.values())
    assert held == pytest.approx(base + 2 * adapter + 4 * adapter, rel=1e-3)  # actor's and reward's


def test_frozen_models_that_are_offloaded_are_on_the_gpu_only_while_they_score():
    planned = plan("0.5b", FULL.change(offload_frozen=True), GPU)
    assert set(phase(planned, "learn").roles) == set(phase(planned, "generate").roles) == {"actor", "critic"}
    assert len(set(phase(planned, "score").roles) & {"reward", "reference"}) == 1
    frozen = planned.models.reward.parameters + planned.models.reference.parameters
    assert planned.host == 4 * frozen
    stays = plan("0.5b", FULL, GPU)
    saved = phase(stays, "learn").total - phase(planned, "learn").total
    assert saved == pytest.approx(4 * frozen)


def test_zero_3_divides_every_model_and_gathers_the_actor_to_generate():
    layout = FULL.change(zero_stage=3, compute="bf16")
    planned = plan("0.5b", layout, dataclasses.replace(GPU, gpus=4))
    number = planned.models.actor.parameters
    learn = phase(planned, "learn").roles
    assert learn["actor"].weights == 2 * number / 4
    assert learn["reference"].weights == 2 * number / 4
    apart = plan("0.5b", layout.change(gather_for_generation=False), dataclasses.replace(GPU, gpus=4))
    gathered = phase(planned, "generate").total - phase(apart, "generate").total
    assert gathered == 2 * number * 3 / 4


@pytest.mark.parametrize("changes", [{}, {"method": "lora", "critic": "head", "reference": "adapter"}])
def test_shares_of_fsdp_add_up_to_what_one_process_holds(changes):
    """In float32, where FSDP2 changes no dtype: the weights and states of what learns, without what is gathered."""
    alone = FULL.change(compute="fp32", accumulation=1, **changes)
    whole = phase(plan("0.5b", alone, GPU), "learn").roles
    share = phase(plan("0.5b", alone.change(fsdp=True), dataclasses.replace(GPU, gpus=4)), "learn").roles
    assert share.keys() == whole.keys()
    for role in ("actor", "critic"):
        usage = whole[role]
        assert 4 * share[role].weights == pytest.approx(usage.weights)
        assert 4 * share[role].optimizer == pytest.approx(usage.optimizer)


def test_fsdp_gathers_the_actor_to_generate_and_holds_whole_gradients_between_micro_batches():
    layout, machine = FULL.change(fsdp=True), dataclasses.replace(GPU, gpus=4)
    planned = plan("0.5b", layout, machine)
    number = planned.models.actor.parameters
    generate = phase(planned, "generate").roles["actor"]
    assert generate.buffers > 2 * number
    assert generate.weights == 4 * number / 4, "float32 shares, gathered in 16 bits"
    learn = phase(planned, "learn").roles["actor"]
    at_once = phase(plan("0.5b", layout.change(accumulation=1), machine), "learn").roles["actor"]
    assert learn.gradients - at_once.gradients > number, "2 bytes each, until the last micro-batch"


def test_vllm_takes_its_share_and_sleeps():
    awake = plan("0.5b", FULL.change(vllm_share=0.3), GPU)
    asleep = plan("0.5b", FULL.change(vllm_share=0.3, vllm_sleeps=True), GPU)
    assert phase(awake, "learn").other == phase(asleep, "generate").other == 0.3 * 80 * GIB
    assert phase(asleep, "learn").other == 0
    assert all(usage.kv_cache == 0 for usage in phase(awake, "generate").roles.values())


def test_dpo_with_shared_prompts_keeps_fewer_activations():
    layout = Layout(trainer="dpo", critic="none", reward="none", prompt=1536, response=128, micro_batch=4)
    shared, apart = (plan("0.5b", layout.change(share_prefixes=on), GPU) for on in (True, False))
    assert layout.learned_tokens == 4 * (1536 + 2 * 128)
    assert shared.needed < apart.needed


def test_plan_knows_what_fits_and_says_what_does_not():
    planned = plan("7b", FULL, GPU)
    assert not planned.fits
    text = planner.plan_text(planned)
    assert f"It does not fit: {planned.needed / GIB:.1f} of 80.0 GiB on each GPU" in text
    small = plan("0.5b", FULL, GPU)
    assert small.fits
    assert "It fits" in planner.plan_text(small)


def test_context_and_fragmentation_are_added_by_name():
    planned = plan("0.5b", FULL, dataclasses.replace(GPU, context=3.0, fragmentation=0.5))
    assert planned.needed == 1.5 * planned.peak.total + 3.0


WASTEFUL = FULL.change(gradient_checkpointing=False, micro_batch=8, accumulation=1)


@pytest.mark.parametrize("name, layout, gpu", [("0.5b", WASTEFUL, 14.6), ("8b", FULL, 24), ("1.5b", DPO, 24)])
def test_smallest_change_makes_it_fit(name, layout, gpu):
    failed = plan(name, layout, dataclasses.replace(GPU, memory=gpu * GIB))
    assert not failed.fits
    assert plan(name, smallest_change(failed)[-1].layout, failed.hardware).fits


def test_smallest_change_is_the_cheapest_that_will_do():
    """Each cheaper change alone does not make it fit."""
    needs = plan("0.5b", WASTEFUL, GPU).needed
    failed = plan("0.5b", WASTEFUL, dataclasses.replace(GPU, memory=0.999 * needs))
    (found,) = smallest_change(failed)
    for cheaper in changes(WASTEFUL, failed.hardware):
        if cheaper == found:
            break
        assert not plan("0.5b", cheaper.layout, failed.hardware).fits


def test_changes_together_keep_the_training_and_are_all_needed():
    """4 × 80 GB (docs/scale.md) with 2 TB of host memory: no single change makes four 33B models fit in full."""
    layout = FULL.change(zero_stage=3, compute="bf16", prompt=512, response=512, rollout=16, accumulation=16)
    failed = plan("33b", layout, dataclasses.replace(GPU, gpus=4, host_memory=2048 * GIB))
    found = smallest_change(failed)
    assert len(found) > 1
    assert all(change.keeps_training for change in found)
    assert plan("33b", found[-1].layout, failed.hardware).fits
    assert (found[-1].layout.method, found[-1].layout.critic) == ("full", "model")
    for alone in changes(layout, failed.hardware, keeping_training=True):
        assert not plan("33b", alone.layout, failed.hardware).fits


def test_no_change_makes_a_70b_model_fit_12_gb():
    assert smallest_change(plan("70b", FULL, dataclasses.replace(GPU, memory=12 * GIB))) == []


def test_changes_that_keep_the_training_keep_it():
    for change in changes(FULL, dataclasses.replace(GPU, gpus=4), keeping_training=True):
        assert (change.layout.method, change.layout.critic) == (FULL.method, FULL.critic)
        assert change.layout != FULL


def test_suggestions_fit_and_are_the_fastest_of_their_kind():
    gpu = dataclasses.replace(GPU, memory=24 * GIB)
    found = suggest("1.5b", FULL, gpu)
    kinds = [(p.layout.method, p.layout.critic) for p in found]
    assert len(set(kinds)) == len(kinds)
    assert {"full", "lora", "qlora"} == {method for method, _ in kinds}
    assert all(p.fits for p in found)
    assert all(p.layout.response == FULL.response for p in found)
    of_head = next(p for p in found if (p.layout.method, p.layout.critic) == ("qlora", "head"))
    slower = speed(plan("1.5b", of_head.layout.change(gradient_checkpointing=True, micro_batch=1), gpu))
    assert slower.tokens_per_second <= speed(of_head).tokens_per_second


@pytest.mark.parametrize("start", [FULL.change(accumulation=4, rollout=4), DPO.change(accumulation=4)])
def test_no_layout_with_any_micro_batch_is_faster_than_the_suggested_one(start):
    gpu, best = dataclasses.replace(GPU, memory=16 * GIB, host_memory=64 * GIB), {}
    for layout in layouts(start, gpu):
        for size in range(1, 5):
            if start.trainer == "dpo" and size == 3:
                continue  # another step
            batches = {"micro_batch": size, "accumulation": -(-4 // size)}
            batches |= {"micro_batch_tokens": size * start.length} if start.trainer == "ppo" else {}
            planned = plan("1.5b", layout.change(**batches), gpu)
            if planned.fits:
                offloads = 2 * layout.offload_optimizer + layout.offload_frozen
                rate = -offloads, speed(planned).tokens_per_second
                kind = layout.method, layout.critic
                best[kind] = max(best.get(kind, rate), rate)
    found = suggest("1.5b", start, gpu)
    assert {(p.layout.method, p.layout.critic) for p in found} == best.keys()
    for planned in found:
        offloads, rate = best[planned.layout.method, planned.layout.critic]
        assert 2 * planned.layout.offload_optimizer + planned.layout.offload_frozen == -offloads
        assert speed(planned).tokens_per_second == pytest.approx(rate, rel=1e-5)


def test_one_micro_batch_for_the_whole_step_is_found_where_two_do_not_fit():
    """It holds no gradients of an earlier one, so a bisection from smaller ones would miss it."""
    layout = FULL.change(critic="head", reference="none", reward="none", compute="autocast")
    sizes = ({"micro_batch": 8, "accumulation": 1}, {"micro_batch": 7, "accumulation": 2})
    one, two = (plan("0.5b", layout.change(**size), GPU).needed for size in sizes)
    assert one < two
    gpu = dataclasses.replace(GPU, memory=(one + two) / 2, host_memory=GIB)
    found = [p.layout for p in suggest("0.5b", layout, gpu) if p.layout.method == "full"]
    assert [layout.micro_batch for layout in found] == [8]


def test_suggested_budget_of_tokens_fits_and_one_sequence_more_does_not():
    """The table names a number of tokens, which a run takes as `micro_batch_tokens`."""
    start = FULL.change(prompt=512, response=1024, rollout=32, accumulation=32)
    gpu = dataclasses.replace(GPU, memory=24 * GIB)
    below_the_rollout = 0
    for planned in suggest("1.5b", start, gpu):
        (tokens,) = map(int, re.findall(r"\((\d+) tokens\)", planner.suggestion_table([planned])))
        fits = []
        for budget in (tokens, tokens + start.length):
            options = {"per_device_train_batch_size": 32, "response_length": 1024, "micro_batch_tokens": budget}
            run = planner.layout_from_options("ppo", options, gpu, prompt=512)
            batches = ("micro_batch", "accumulation", "micro_batch_tokens")
            layout = planned.layout.change(**{name: getattr(run, name) for name in batches})
            fits.append(plan("1.5b", layout, gpu).fits)
        assert fits == [True, tokens == 32 * start.length]
        below_the_rollout += tokens < 32 * start.length
    assert below_the_rollout > 2


BUDGETED = Layout(method="lora", critic="head", compute="bf16", rollout=32, micro_batch=8, accumulation=4)


def test_budget_of_tokens_plans_the_micro_batches_that_it_holds():
    """As many sequences of 512 + 512 tokens as fit, over the same step, computed as often as by number."""
    for tokens, batch in ((2048, 2), (3000, 2), (8192, 8), (10**6, 32)):
        one, other = (
            plan("7b", BUDGETED.change(**change), GPU)
            for change in (
                {"micro_batch_tokens": tokens},
                {"micro_batch": batch, "accumulation": 32 // batch},
            )
        )
        assert (one.layout.micro_batch, one.layout.accumulation) == (batch, 32 // batch)
        assert speed(one) == speed(other)
        assert one.needed >= other.needed  # there is room for more of short prompts' answers
        assert f"micro-batch {batch} ({min(tokens, 32 * 1024)} tokens)" in planner.plan_text(one)


def test_budget_of_scoring_takes_the_place_of_the_scoring_batch():
    layout = BUDGETED.change(score_batch_tokens=2048)
    assert layout.scoring == (2048, 2048)
    of_score = [plan("7b", each, GPU).phases[1].total for each in (layout, BUDGETED)]
    assert of_score[0] < of_score[1]


def test_a_smaller_budget_is_proposed_where_budgets_are_set():
    layout = BUDGETED.change(micro_batch_tokens=8192, score_batch_tokens=8192)
    proposed = {change.setting: change.layout for change in changes(layout, GPU)}
    assert proposed["micro_batch_tokens: 1024"].learned_tokens == 1024
    assert proposed["score_batch_tokens: 1024"].scoring[0] == 1024
    assert not any("micro-batch of 1" in setting or "local_rollout" in setting for setting in proposed)


# ---- Speed


def test_generation_is_bound_by_bandwidth_and_learning_by_flops():
    layout = FULL.change(compute="bf16", method="lora", reference="none", reward="none", critic="head")
    planned = plan("8b", layout, GPU)
    base = speed(planned)
    wider = speed(plan("8b", layout, dataclasses.replace(GPU, bandwidth=2 * GPU.bandwidth)))
    faster = speed(plan("8b", layout, dataclasses.replace(GPU, flops=2 * GPU.flops)))
    assert wider.generate < 0.6 * base.generate
    assert wider.learn == pytest.approx(base.learn, rel=0.02)
    assert faster.learn == pytest.approx(base.learn / 2, rel=0.02)


def test_learning_costs_six_flops_a_weight_and_token(monkeypatch):
    """Kaplan et al. 2020: 6 N per token forward and backward, 8 N with recomputation; attention is little here."""
    layout = FULL.change(critic="head", compute="bf16", prompt=16, response=16)
    monkeypatch.setattr(timing, "MFU", 1.0)
    monkeypatch.setattr(timing, "BANDWIDTH", 1e9)
    planned = plan("33b", layout, Hardware(memory=1e15, flops=1e15))
    tokens, number = 8 * 32, planned.models.actor.parameters
    seconds = speed(planned).learn
    assert seconds == pytest.approx(8 * number * tokens / 1e15, rel=0.02)
    without = plan("33b", layout.change(gradient_checkpointing=False), planned.hardware)
    assert speed(without).learn == pytest.approx(seconds * 6 / 8, rel=0.01)


def test_a_token_costs_one_reading_of_the_weights(monkeypatch):
    monkeypatch.setattr(timing, "BANDWIDTH", 1.0)
    layout = FULL.change(critic="head", compute="bf16", method="lora", reference="none", prompt=1, rollout=1)
    planned = plan("33b", layout.change(accumulation=1), Hardware(memory=1e15, flops=1e20, bandwidth=1e12))
    seconds = speed(planned).generate
    assert seconds == pytest.approx(256 * 2 * 32.53e9 / 1e12, rel=0.02)


def test_more_gpus_give_more_tokens_and_cost_no_more_than_they_are():
    layout = FULL.change(zero_stage=3, compute="bf16")
    one, many = (speed(plan("7b", layout, dataclasses.replace(GPU, gpus=n))) for n in (8, 1024))
    assert one.tokens_per_second < many.tokens_per_second <= 128 * one.tokens_per_second
    assert many.gpu_hours(1e5) >= one.gpu_hours(1e5)


def test_offloading_costs_time():
    layout = FULL.change(zero_stage=3, compute="bf16")
    away = layout.change(offload_optimizer=True, offload_parameters=True)
    near, far = (speed(plan("7b", chosen, GPU)) for chosen in (layout, away))
    assert far.learn > near.learn


def test_assumptions_are_printed():
    text = planner.speed_text(plan("0.5b", FULL, GPU), 1000)
    assert "MFU 40%" in text
    assert "1,000 responses" in text


def test_scale_table_has_a_row_for_each_number_of_gpus():
    layout = FULL.change(zero_stage=3, compute="bf16")
    table = planner.scale_table(plan("7b", layout, GPU), (1, 64, 4096), 1e5)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["1", "64", "4096"]


# ---- Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"critic": "none"}, "PPO has a critic"),
        ({"trainer": "dpo"}, "DPO has no critic and no reward model"),
        ({"trainer": "reward"}, "reference='model' were given. Set all three to 'none'"),
        ({"critic": "adapter"}, r"method='full' moves the base, on which \['critic'\] would be adapters"),
        ({"method": "qlora", "zero_stage": 3, "compute": "bf16"}, "4 bits under ZeRO-3 cannot be planned yet"),
        ({"zero_stage": 3, "compute": "bf16", "reward_bits": 8}, "ZeRO-3 cannot partition a quantised reward"),
        ({"offload_optimizer": True}, "is DeepSpeed's: set `zero_stage`"),
        ({"offload_parameters": True, "zero_stage": 2, "compute": "bf16"}, "by ZeRO-3 alone"),
        ({"offload_frozen": True, "zero_stage": 3, "compute": "bf16"}, "ZeRO-3 partitions frozen models"),
        ({"offload_frozen": True, "reward_bits": 8}, "8-bit layers cannot be moved"),
        ({"zero_stage": 2}, "computes in the dtype of its weights"),
        ({"fsdp": True, "zero_stage": 3, "compute": "bf16"}, "`fsdp` and `zero_stage=3` are two engines"),
        ({"fsdp": True, "method": "lora", "critic": "adapter"}, r"cannot shard the base that \['critic'\] share"),
        ({"fsdp": True, "reward_bits": 8}, "has not been tried with quantised weights"),
        ({"fsdp": True, "offload_frozen": True}, "FSDP shards frozen models"),
        ({"vllm_share": 1.0}, "from 0 to below 1"),
        ({"method": "dora"}, "must be one of"),
        ({"micro_batch": 0}, "at least 1"),
        ({"micro_batch_tokens": 1000, "score_batch_tokens": 500}, r"=1000 and score_batch_tokens=500 .* least 1024"),
    ],
)
def test_parts_that_do_not_go_together_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Layout(**options)


def test_hardware_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="must be above 0"):
        Hardware(gpus=0)
    with pytest.raises(ValueError, match=r"does not know the GPU 'rtx4091'\. Did you mean `--gpu rtx4090-24gb`"):
        planner.hardware("rtx4091")
    with pytest.raises(ValueError, match=r"'8xH100' is several GPUs: name one, 'h100', .* `--gpus 8`"):
        planner.hardware("8xH100")
    with pytest.raises(ValueError, match=r"does not know the GPU '64gb'\. It knows "):
        planner.hardware("64gb")


@pytest.mark.parametrize(
    "said, card",
    [
        ("4090", "rtx4090-24gb"),
        ("RTX 4090", "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 3060", "rtx3060-12gb"),
        ("a100", "a100-80gb"),
        ("A100-40", "a100-40gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("h20", "h20-96gb"),
        ("rtx 5090", "rtx5090-32gb"),
        ("4060 ti", "rtx4060ti-16gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000-96gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada-48gb"),
        ("Tesla T4", "t4-16gb"),
        ("b200", "b200-180gb"),
        ("24GB", "rtx3090-24gb"),
        ("80 gb", "a100-80gb"),
        ("4070 super", "rtx4070-12gb"),
        ("4070 ti super", "rtx4070tisuper-16gb"),
        ("NVIDIA GeForce RTX 4080 SUPER", "rtx4080-16gb"),
        ("3090 ti", "rtx3090ti-24gb"),
        ("H800", "h800-80gb"),
        ("4091", None),
        ("25gb", None),
    ],
)
def test_cards_are_found_by_what_people_call_them(said, card):
    assert find_gpu(said) == card


def test_every_card_is_found_by_its_own_name_and_has_the_memory_that_it_names():
    for card, speeds in planner.GPUS.items():
        assert find_gpu(card) == card
        named = float(re.search(r"-(\d+)gb$", card).group(1))
        assert 0.9 * named <= speeds["memory"] / GIB <= named


def test_host_memory_is_that_of_the_usual_machine_and_always_said():
    one, eight = planner.hardware("h100"), planner.hardware("h100", gpus=16)
    assert (one.host_memory, eight.host_memory) == (256 * GIB, 8 * 256 * GIB)  # of a node of 8
    assert one.with_gpus(16) == eight
    assert planner.hardware("h100", host_memory=5.0).with_gpus(8).host_memory == 5.0
    assert "Host memory of a node: 0 of 256 GiB for what is offloaded, assumed for h100-80gb" in planner.plan_text(
        plan("0.5b", FULL, one)
    )
    assert "Host memory of a node: 256 GiB" in planner.suggestion_table(suggest("0.5b", FULL, one))


def test_what_stays_in_16_bits_and_what_sees_is_said():
    text = planner.plan_text(plan("30b-a3b", ON_ONE_BASE, GPU))
    assert "29.0B of them experts, which stay in 16 bits" in text
    assert "stay in 16 bits" not in planner.plan_text(plan("8b", ON_ONE_BASE, GPU))
    assert "0.42B of them to see or hear" in planner.plan_text(plan("gemma-3-4b", ON_ONE_BASE, GPU))


def test_plan_of_dpo_speaks_of_pairs_and_of_no_role_that_it_has_not():
    planned = plan("0.5b", DPO, GPU)
    said = (
        planner.plan_text(planned)
        + planner.speed_text(planned, 10)
        + planner.suggestion_table(suggest("0.5b", DPO, GPU))
    )
    assert not re.search("critic|reward|rollout|responses|generat|score", said)
    assert "an optimizer step of 1;" in said


def test_layouts_that_offload_the_optimizer_are_suggested_where_no_other_fits():
    """Of a kind of training that fits without, the one without is taken, though it may be slower."""
    roomy, tight = (dataclasses.replace(GPU, memory=memory * GIB, host_memory=512 * GIB) for memory in (80, 8))
    start = FULL.change(reference="none", reward="none")
    assert not any(p.layout.offload_optimizer for p in suggest("0.5b", start, roomy))
    full = [p.layout for p in suggest("1.5b", start, tight) if p.layout.method == "full"]
    assert full
    assert all(layout.offload_optimizer for layout in full)


def test_models_of_their_own_sizes_count_as_such(tmp_path):
    tiny.tiny_config().save_pretrained(tmp_path)
    planned = plan(ModelNames("0.5b", reward=str(tmp_path), critic="1.5b"), FULL, GPU)
    assert planned.models.reward.hidden == load_config(str(tmp_path)).hidden_size == 16
    assert planned.models.critic.hidden == 1536
    assert planned.models.reference.parameters == planned.models.actor.parameters


def test_models_that_no_gpu_holds_whole_are_sharded_while_they_sample():
    """Under ZeRO-3 alone the whole model is gathered for a rollout, so neither change helps without the other."""
    roles = {"method": "lora", "critic": "head", "reward": "none", "reference": "adapter", "compute": "bf16"}
    failed = plan("gpt-oss-120b", Layout(**roles, rollout=16, accumulation=16), planner.hardware("h200", gpus=8))
    (change,) = smallest_change(failed)
    assert not failed.fits
    assert change.setting == "ZeRO-3 with ds3_gather_for_generation: false"


def test_suggestions_under_fsdp_name_it():
    start = Layout(fsdp=True, rollout=16, accumulation=16)
    table = planner.suggestion_table(planner.suggest("1.5b", start, planner.hardware("4090", gpus=4)))
    engines = {row.split("|")[3].strip() for row in table.split("\n\n")[0].splitlines()[2:]}
    assert engines == {"FSDP2"}
