"""Names that DPO's options may have: those of TRL, and no others."""

import inspect
import re

import pytest
from trl.trainer import dpo_trainer

from trl_ext import DPOConfigX
from trl_ext.dpo.config import DIVERGENCES, LOSS_TYPES, TRUNCATIONS


def test_loss_types_divergences_and_truncations_are_trls():
    """Those that TRL compares with, at the first step or in the first batch."""
    source = inspect.getsource(dpo_trainer)
    assert set(LOSS_TYPES) == set(re.findall(r'if loss_type == "(\w+)"', source))
    assert set(DIVERGENCES) == set(re.findall(r'if self\.f_divergence_type == "(\w+)"', source))
    assert set(TRUNCATIONS) == set(re.findall(r'if self\.truncation_mode == "(\w+)"', source))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "sigmoyd"}, r"`loss_type` has \['sigmoyd'\], which there is not; it may have sigmoid, "),
        ({"loss_type": ["sigmoid", "rpo"]}, r"`loss_type` has \['rpo'\]"),
        ({"f_divergence_type": "kl"}, "`f_divergence_type` is 'kl'; it must be one of"),
        ({"truncation_mode": "middle"}, "`truncation_mode` is 'middle'; it must be one of"),
    ],
)
def test_name_that_there_is_not_is_refused_with_those_that_there_are(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        DPOConfigX(str(tmp_path), **options)
