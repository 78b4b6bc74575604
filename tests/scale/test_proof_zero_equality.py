"""
One process, two under DDP, ZeRO-2, ZeRO-3 and FSDP2: the same losses, gradient norms and final weights, over ten steps
of AdamW with clipping, on given responses whose lengths differ so much that a mean of means would be another number.
"""

import functools

import pytest

import equality_worker
import two_processes
from measurements import differences


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-4
TOLERANCES = {"fsdp2": 1e-5}
WRAPPERS = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equality")
    equality_worker.save(folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    return two_processes.measured(equality_worker.measure, folder, timeout=900)


@pytest.fixture(scope="module")
def alone(folder):
    @functools.cache
    def run(case):
        without_budgets = dict.fromkeys(("micro_batch_tokens", "score_batch_tokens")) if "tokens" in case else {}
        return equality_worker.run(case, folder, None, 8, **without_budgets)

    return run


@pytest.mark.parametrize("case, layout", equality_worker.RUNS)
def test_two_processes_learn_what_one_does(alone, measured, case, layout):
    run = measured[f"{case}, {layout}"]
    assert run["wrapper"].startswith(WRAPPERS[layout])
    assert len(run["lines"]) == 10
    if "stop" in case:
        assert 0 < sum(line["policy/steps_left_out"] for line in run["lines"]) < 8
    apart = differences(run, alone(case))
    assert {"loss", "grad_norm"} <= apart.keys()
    worst = max(apart, key=apart.get)
    print(f"\n{case}, {layout}: largest difference {apart[worst]:.1e} ({worst})")
    assert apart[worst] < TOLERANCES.get(layout, TOLERANCE), sorted(apart.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_packed_rows_and_budgets_learn_what_padded_rows_do(measured, layout):
    packed, padded = measured[f"ppo, model, tokens, {layout}"], measured[f"padded, {layout}"]
    assert (packed["packs"], padded["packs"]) == (True, False)
    apart = differences(packed, padded)
    worst = max(apart, key=apart.get)
    print(f"\n{layout}: largest difference {apart[worst]:.1e} ({worst})")
    assert apart[worst] < 1e-5


def test_control_a_gradient_of_one_share_is_noticed(measured, alone):
    """The loss is a share of a sum over the ranks, whose gradients are averaged: the factor of two is forgotten."""
    assert differences(measured["mistake"], alone("ppo, model"))["grad_norm"] > 100 * TOLERANCE
