"""Two processes give the losses, the parameters and the ledger's metrics of one."""

import pytest

import dpo_layouts
from measurements import difference


TOLERANCE = 1e-4  # of numbers near 0.1 and above, after four steps in float32


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")  # accelerate and DeepSpeed import half of their optional dependencies
def test_two_processes_measure_what_one_does(of_two_processes):
    """The same run on one process and on two, of one and of two micro-batches each; a ledger per rank does show."""
    measured = dict(of_two_processes["dpo"])
    memory = measured.pop("hungry rank")
    alone = {case: dpo_layouts.run(8, 1, **options) for case, options in dpo_layouts.CASES.items()}
    assert alone["sigmoid"]["lines"][-1]["eval_preference/pairs"] == 11
    assert alone["sigmoid"]["lines"][0]["preference/pairs"] == 16
    differences = {name: difference(result, alone.get(name, alone["sigmoid"])) for name, result in measured.items()}
    assert differences.pop("ledger per rank") > 1e-2
    assert differences.keys() == {*dpo_layouts.CASES, "2 x 2"}
    assert max(differences.values()) < TOLERANCE, differences
    assert memory["memory/evaluate"] - memory["memory/learn"] > 0.8 * 200 / 1024  # GiB, of the rank that needs most


@pytest.mark.integration
@pytest.mark.parametrize("case", dpo_layouts.CASES)
def test_micro_batches_change_nothing(case):
    """Four micro-batches of two pairs are one batch of eight."""
    options = dpo_layouts.CASES[case]
    assert difference(dpo_layouts.run(2, 4, **options), dpo_layouts.run(8, 1, **options)) < TOLERANCE
