"""When sequences are cut into segments: a rule of shapes alone."""

import dataclasses

import numpy as np
import pytest

from hla.arguments import prepare
from hla.device import plan
from hla.device.segments import LEAST, WHOLE, tokens
from hla.device.steps import Launch, Limits


def request(T, heads=16, D=4, mask="causal"):
    q = np.broadcast_to(np.zeros(1), (heads, T, D))
    return prepare(q, q, q, operator="hla2", mask=mask, decay=None, log_gate=None, scale=1.0)[0]


@pytest.mark.parametrize("heads", [1, 16, 44, 45, 132, 1000])
def test_at_most_one_wave_of_whole_periods(heads):
    """Up to 2048 tokens a head's bits do not depend on how many heads there are."""
    for T in (0, 1, WHOLE, WHOLE + 1, 8192, 65537, 1 << 20):
        n = tokens(request(T, heads), 132, 256, 128)
        count = -(-T // n) if n else 1
        assert n % 256 == 0
        assert (n == 0) == (T <= WHOLE or heads > 44)
        assert n == 0 or (count > 2 and n >= LEAST and count * heads <= 132)


def test_a_wave_is_filled():
    assert tokens(request(1 << 16), 132, 256, 128) == 8192
    assert tokens(request(1 << 20, 1), 132, 256, 128) == 8192
    assert tokens(dataclasses.replace(request(1 << 16), mask="none"), 132, 256, 128) == 0
    assert tokens(request(1 << 16, D=129), 132, 256, 128) == 16384  # two tiles of values


@pytest.mark.parametrize("end", [False, True])
def test_the_last_segment_leaves_no_state_that_nothing_reads(end):
    """Last in the direction of a launch; of 2500 tokens by 1024 the reverse ones leave out 1024."""
    asked = dataclasses.replace(request(2500), return_state=end)
    for planned in (plan.forward, plan.backward):
        steps = planned(asked, Limits(), tokens=1024).steps
        alone = [x for x in steps if isinstance(x, Launch) and not x.q and x.tokens]
        assert alone
        for x in alone:
            assert x.short == (not end or planned is plan.backward)
            assert x.length(2500) == (1476 if x.reverse else 2048 if x.short else 2500)
