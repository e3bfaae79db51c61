"""The paper's formulas against writing them out, terms against the bound they belong to, and the rows that come of a trace."""

import itertools
import math

import numpy as np
import paper
import pytest
import terms
import tightness
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from paper import Facts, fewest
from replay import Stored
from tierd_kernels.policy import Budget
from tierd_kernels.quantise.reference import dequantise_values, quantise_block
from tierd_kernels.score.reference import quantised_scores
from traces import Trace

shares = st.lists(st.tuples(st.floats(1e-6, 1.0), st.floats(0.0, 2.0)), min_size=1, max_size=6)


def of_rows(rows: list[tuple[float, float]], key_factor: float) -> Facts:
    rho, eta = (np.array([x], float) for x in zip(*rows, strict=True))
    return Facts(rho / rho.sum(), eta, np.array([key_factor]), np.array([1.0]))


def left(facts: Facts, keys: np.ndarray, values: np.ndarray) -> float:
    rho = facts.rho_Rb[0]
    key = 0.0 if keys.all() else facts.key_factor_R[0] * float(rho[~keys].sum())
    return key + float((rho * facts.eta_Rb[0])[~values].sum())


@given(shares, st.one_of(st.floats(0.0, 10.0), st.just(math.inf)), st.floats(0.0, 1.0))
def test_no_smaller_promotion_brings_the_papers_bound_within_the_budget(
    rows: list[tuple[float, float]], key_factor: float, rtol: float
) -> None:
    facts = of_rows(rows, key_factor)
    keys, values = (mask[0] for mask in fewest(facts, rtol))
    assert left(facts, keys, values) <= rtol + 1e-12
    count = int(keys.sum() + values.sum())
    for chosen in itertools.combinations(range(2 * len(rows)), max(0, count - 1)):
        picked = np.isin(np.arange(2 * len(rows)), chosen).reshape(2, -1)
        assert count == 0 or left(facts, *picked) > rtol - 1e-12


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(tiny.TRACE)


def test_facts_are_those_of_the_stored_blocks(trace: Trace) -> None:
    """Scores by the reference, block by block; D, V max and eta from there."""
    tensors, stored = trace.layer(0), trace.stored(0)
    q, seen = tensors["queries"][3], trace.seen(3)
    step, _ = stored.climbed(q, seen, tightness.ANY, Budget(skip_share=0.0))
    facts = paper.facts(step)
    head, d_max, mass, eta = 3, 0.0, [], []
    k, v = tensors["keys"][1, :seen].double().numpy(), tensors["values"][1, :seen].double().numpy()
    for start in range(0, seen // 16 * 16, 16):
        block = quantise_block(*(tensors[name][1, start : start + 16].numpy() for name in ("keys", "values")), stored.layout)
        scores, delta, _, _ = quantised_scores(block, q[head].double().numpy(), stored.scale)
        d_max = max(d_max, delta)
        mass.append(np.exp(scores).sum())
        eta.append(np.linalg.norm(v[start : start + 16] - dequantise_values(block, stored.layout), axis=1).max())
    tail = np.exp(k[seen // 16 * 16 :] @ q[head].double().numpy() * stored.scale).sum()
    rho = np.array(mass) / (sum(mass) + tail)
    np.testing.assert_allclose(facts.rho_Rb[head], rho, rtol=1e-2)
    np.testing.assert_allclose(facts.eta_Rb[head], eta, rtol=2.0**-7)
    v_max = np.linalg.norm(v, axis=1).max()
    assert facts.key_factor_R[head] == pytest.approx(2 * v_max * math.exp(3 * d_max) * math.expm1(2 * d_max), rel=1e-2)
    assert facts.bound_R[head] == pytest.approx(facts.key_factor_R[head] * rho.sum() + (rho * eta).sum(), rel=1e-2)


def test_no_term_makes_the_bound_longer_and_some_make_it_shorter(trace: Trace) -> None:
    gains: dict[str, float] = dict.fromkeys(terms.TERMS, 1.0)
    for layer in range(2):
        tensors, stored = trace.layer(layer), trace.stored(layer)
        for number in range(0, trace.meta.steps, 4):
            step, result = stored.climbed(tensors["queries"][number], trace.seen(number), tightness.ANY, Budget(skip_share=0.0))
            found = terms.bounds(step)
            np.testing.assert_allclose(found["all"], result.certificate["bound"][:, 0], rtol=1e-4)
            for term in terms.TERMS:
                assert (found[term] >= found["all"] * (1 - 1e-12)).all(), term
                gains[term] = max(gains[term], float((found[term] / found["all"]).max()))
    # Of 300 tokens no group of 1024 is complete, so the forms that need one say nothing.
    assert gains["T3"] == gains["value, group form"] == 1.0
    assert all(gains[term] > 1.001 for term in ("T1", "T2", "value, block form", "cap")), gains


def test_complete_groups_pay_on_spread_attention() -> None:
    generator = torch.Generator().manual_seed(3)
    k, v, q = (torch.randn(*shape, 64, generator=generator) for shape in ((1, 2048), (1, 2048), (2,)))
    stored = Stored.of(k, v, 0.125, 16, 16)
    step, _ = stored.climbed(q, 2048, tightness.ANY, Budget(skip_share=0.0))
    found = terms.bounds(step)
    assert (found["T3"] > 1.01 * found["all"]).all() and (found["value, group form"] > 1.01 * found["all"]).all()
    assert set(terms.costs_us(stored, step, rounds=1)) == {"o_G . O", "bounds", "SV and SR"}


def test_rows_of_a_trace_agree_with_one_another(trace: Trace) -> None:
    tally = tightness.Tally()
    costs = tightness.measure(trace, 3, tally)
    rows = tightness.summarise(tally, costs)
    ratios = [row for row in rows if row["kind"] == "ratio"]
    assert len(ratios) == 2 * 4 and all(0.0 < row["ours_p50"] <= row["ours_max"] <= 1.0 for row in ratios)
    assert all(row["paper_max"] <= 1.0 for row in ratios)
    for policy in ("budget", "coverage", "paper's formulas"):
        bytes_ = [row["host_bytes"] for row in rows if row["kind"] == "cost" and row["policy"] == policy]
        assert len(bytes_) == 4 and bytes_ == sorted(bytes_, reverse=True), "a wider tolerance needs no more"
    budget = next(row for row in rows if row["kind"] == "cost" and row["policy"] == "budget" and row["rtol"] == 0.05)
    assert sum(budget["rungs"]) == 2 * 3 * 4
    assert budget["host_bytes"] == pytest.approx((budget["key_blocks"] + budget["value_blocks"]) * 16 * 64 * 2)
    found = tightness.headline(rows)
    assert found["bytes_vs_paper_rtol5"] > 1.0 and 0.0 < found["error_over_bound_ours_p50"] <= 1.0
