"""What the simulator says of wrong kernels: each mistake is made once, and caught, under every schedule tried."""

import re
from pathlib import Path

import pytest
import torch

from fastattn.testing import simulator

SEEDS = range(3)
RACE, UNWRITTEN, DEADLOCK, DIVERGENCE = "race: ", "nobody has written", "deadlock", "divergence: "
OUTSIDE, MISALIGNED, UNFENCED, IN_FLIGHT = "out of bounds", "misaligned", "missing fence_proxy_async", "in flight"

SMALL = {  # of mistakes.cu: what is said of each; None: nothing is wrong
    "lanes_take_different_ways": DIVERGENCE,
    "a_lane_leaves_before_the_others_shuffle": "exit",
    "a_partial_mask": "a mask other than",
    "a_warp_skips_the_wgmma": DIVERGENCE,
    "a_warpgroup_with_different_descriptors": "different operands",
    "a_tile_that_starts_within_a_pattern": MISALIGNED,
    "half_the_block_syncs": DEADLOCK,
    "different_counts_at_a_barrier": "others came with",
    "a_barrier_that_does_not_exist": "barriers 0 to 15",
    "a_barrier_of_part_of_a_warp": "whole warps",
    "one_side_forgets_to_arrive": DEADLOCK,
    "an_arrival_that_nobody_waits_for": "have arrived at barrier 1",
    "an_mbarrier_that_nobody_initialised": "no mbarrier was initialised",
    "an_mbarrier_used_before_a_barrier": f"{RACE}|no mbarrier was initialised",
    "one_arrival_too_few": DEADLOCK,
    "one_arrival_too_many": "more arrivals",
    "the_wrong_parity": DEADLOCK,
    "polling_what_never_comes": "livelock",
    "more_registers_than_there_are": DEADLOCK,
    "registers_that_grow_to_fewer": "grows to 40",
    "more_bytes_than_a_phase_counts": "counts up to 1048575",
    "registers_by_one_warp": "exits while|have exited|deadlock",
    "a_read_of_what_nobody_wrote": UNWRITTEN,
    "a_store_without_a_barrier": f"{RACE}|{UNWRITTEN}",
    "two_stores_to_one_place": RACE,
    "a_store_over_what_another_still_reads": RACE,
    "no_syncwarp": f"{RACE}|{UNWRITTEN}",
    "a_load_past_the_end": OUTSIDE,
    "a_store_before_the_start": OUTSIDE,
    "ldmatrix_misaligned": MISALIGNED,
    "stmatrix_out_of_bounds": OUTSIDE,
    "a_counter_without_atomics": RACE,
    "a_counter_with_atomics_is_fine": None,
    "bytes_beside_one_another_are_fine": None,
    "cp_async_not_waited_for": IN_FLIGHT,
    "cp_async_not_committed": IN_FLIGHT,
    "cp_async_read_before_the_wait": RACE,
    "cp_async_read_without_a_barrier": f"{RACE}|{UNWRITTEN}",
    "cp_async_that_an_mbarrier_counts_unobserved": IN_FLIGHT,
    "cp_async_misaligned": MISALIGNED,
    "a_store_of_16_bytes_misaligned": MISALIGNED,
    "cp_async_then_wgmma_without_a_fence": UNFENCED,
    "a_store_after_the_fence": UNFENCED,
    "a_bulk_store_overwritten": RACE,
    "a_bulk_store_not_committed": IN_FLIGHT,
    "a_bulk_load_nobody_waits_for": IN_FLIGHT,
    "a_load_over_an_mbarrier": "overwrites the mbarrier",
    "a_load_over_what_was_just_stored": UNFENCED,
    "nothing": None,
}
THREADS = {"more_registers_than_there_are": 384}
# Where a thread is to blame, it is named with its block, warp, lane and instruction.
PLACE = re.compile(r"\[block \d+,\d+,\d+ warp \d+ lane \d+ \(thread \d+\), at [\w.]+")


@pytest.mark.parametrize("name", SMALL)
def test_a_small_mistake_is_caught(simulate, name):
    for seed in SEEDS:
        out = torch.zeros(1024)
        threads = THREADS.get(name, 128)
        said = simulate("mistakes", name.encode(), out, 1, threads, -1, seed=seed, flavour="checked")
        if SMALL[name] is None:
            assert said is None
            continue
        assert said is not None and re.search(SMALL[name], said), said
        assert PLACE.search(said) or DEADLOCK in said or "livelock" in said, said


def test_every_small_mistake_has_a_row():
    kernels = Path(__file__).parent / "kernels"
    text = "".join((kernels / name).read_text() for name in ("mistakes.cu", "mistakes_copies.h"))
    assert set(re.findall(r"__global__ void (\w+)\(", text)) == SMALL.keys() | {"an_accumulator_read_in_flight"}


def test_a_deadlock_names_who_waits_for_what(simulate):
    said = simulate("mistakes", b"one_arrival_too_few", torch.zeros(1024), 1, 128, -1, flavour="checked")
    assert "warp 3 lanes 0-31 in mbarrier.try_wait for parity 0" in said
    assert "1 of 33 arrivals and 0 bytes to come" in said


def test_a_race_names_both_sides(simulate):
    said = simulate("mistakes", b"two_stores_to_one_place", torch.zeros(1024), 1, 128, -1, flavour="checked")
    assert re.search(r"writes shared address \d+ .* warp \d lane \d+ \(thread \d+\) wrote by a store", said), said


def test_an_accumulator_read_in_flight_gives_nan(simulate):
    out = torch.zeros(1024)
    assert simulate("mistakes", b"an_accumulator_read_in_flight", out, 1, 128, -1) is None
    assert out[:128].isnan().all()


LAUNCHES = {
    "part of a warp": (1, 33, 0, "33"),
    "too many threads": (1, 1056, 0, "1056"),
    "too much shared memory": (1, 32, 232449, "232449"),
    "too many rows of blocks": (65536, 32, 0, "65536"),
    "no block": (0, 32, 0, "0"),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_a_launch_that_cuda_refuses_is_refused(simulate, case):
    grid_y, threads, shared_bytes, number = LAUNCHES[case]
    said = simulate("mistakes", b"nothing", torch.zeros(4), grid_y, threads, shared_bytes)
    assert said.startswith("launch: ") and number in said


# A kernel the Hopper way (product.cu), with one thing wrong.
LARGE = {
    1: ("no wait for a loaded tile", f"{RACE}|{UNWRITTEN}"),
    2: ("no wait for a free stage", f"{RACE}|more arrivals"),
    3: ("no wait for a product", "nan"),
    4: ("no wgmma_fence", "missing wgmma_fence"),
    5: ("no proxy fence before a TMA store", UNFENCED),
    6: ("no wait for a TMA store", IN_FLIGHT),
    7: ("no barrier before a TMA store", RACE),
    8: ("a sum is written in flight", "written while a wgmma was in flight"),
    9: ("no fence after mbarrier_init", "missing mbarrier_init_fence"),
    10: ("fewer bytes expected than land", DEADLOCK),
    11: ("more bytes expected than land", DEADLOCK),
    12: ("the wrong phase", f"{RACE}|{DEADLOCK}|{UNWRITTEN}"),
    13: ("a tile is freed too early", RACE),
    14: ("a misaligned tile", MISALIGNED),
    15: ("a tile out of bounds", OUTSIDE),
    16: ("a descriptor with a stray bit", "a descriptor with"),
    17: ("products without a commit", f"{RACE}|{IN_FLIGHT}"),
    18: ("a stage is freed twice", RACE),
    19: ("A's registers change in flight", "must live until the wait"),
}
IN_REGISTERS = (18, 19)


def product(simulate, bug, a_registers, b_mn=True, half=torch.bfloat16, shape=(64, 64, 320), **how):
    m, n, k = shape
    a, b = torch.randn(m, k).to(half), torch.randn(k, n).to(half)
    c = torch.full((m, n), torch.nan, dtype=half)
    given = b if b_mn else b.t().contiguous()
    form = int(half == torch.bfloat16), int(b_mn), int(a_registers)
    said = simulate("product", a, given, c, m, n, k, *form, bug, **how)
    return said, c.double(), a.double() @ b.double()


@pytest.mark.parametrize("bug", LARGE, ids=lambda bug: LARGE[bug][0])
def test_a_mistake_in_a_large_kernel_is_caught(simulate, bug):
    for seed in SEEDS:
        said, out, _ = product(simulate, bug, bug in IN_REGISTERS, seed=seed, flavour="checked")
        if LARGE[bug][1] == "nan":
            assert out.isnan().any()
        else:
            assert said is not None and re.search(LARGE[bug][1], said), said


# The same the way of sm_80 (ampere.cu).
OLDER = {
    1: ("no cp.async wait", RACE),
    2: ("no barrier after the wait", f"{RACE}|{UNWRITTEN}"),
    3: ("one stage for two", RACE),
    4: ("the registers of B change places", None),
    5: ("half a warp takes another way", DIVERGENCE),
    6: ("copies without a commit", f"{RACE}|{IN_FLIGHT}"),
}


def older(simulate, bug, shape=(72, 40, 104), **how):
    m, n, k = shape
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c = torch.full((m, n), torch.nan)
    said = simulate("ampere", a, b, c, m, n, k, bug, **how)
    return said, c.double(), a.double() @ b.double().T


@pytest.mark.parametrize("bug", OLDER, ids=lambda bug: OLDER[bug][0])
def test_a_mistake_in_a_kernel_of_sm_80_is_caught(simulate, bug):
    for seed in SEEDS:
        said, out, want = older(simulate, bug, seed=seed, flavour="checked")
        if OLDER[bug][1] is None:
            assert said is None and not torch.allclose(out, want, atol=1e-2)
        else:
            assert said is not None and re.search(OLDER[bug][1], said), said


@pytest.mark.parametrize("flavour", ["plain", simulator.usual_flavour()])
@pytest.mark.parametrize("shape", [(1, 1, 8), (64, 32, 32), (72, 40, 104)], ids=str)
def test_the_same_kernel_of_sm_80_without_a_mistake_is_right(simulate, shape, flavour):
    for seed in SEEDS:
        said, out, want = older(simulate, 0, shape, flavour=flavour, seed=seed)
        assert said is None
        torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("flavour", ["plain", simulator.usual_flavour()])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("b_mn", [False, True], ids=["b-k", "b-mn"])
@pytest.mark.parametrize("a_registers", [False, True], ids=["ss", "rs"])
def test_the_same_kernel_without_a_mistake_is_right_under_any_schedule(simulate, a_registers, b_mn, half, flavour):
    results = []
    schedules = [{"fixed_order": True}, {"resident": 1, "seed": 5}, *({"seed": seed} for seed in SEEDS)]
    for schedule in schedules:
        torch.manual_seed(0)
        said, out, want = product(simulate, 0, a_registers, b_mn, half, (104, 136, 200), flavour=flavour, **schedule)
        assert said is None
        torch.testing.assert_close(out, want, atol=0.05 if half == torch.float16 else 0.2, rtol=0)
        results.append(out)
    assert all(torch.equal(each, results[0]) for each in results)


def test_random_schedules_see_what_a_fixed_one_misses(simulate):
    """A tile freed too early, without the checks: in turn and as late as may be nothing shows."""

    def wrong(**how):
        said, out, want = product(simulate, 13, False, flavour="plain", **how)
        return said is not None or not torch.allclose(out, want, atol=0.2)

    assert not wrong(fixed_order=True)
    assert any(wrong(seed=seed) for seed in range(8))
