"""A trace gives back what the model was answered, and its replay answers the same."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import Stored
from tierd_client import Geometry, Tolerance, connect
from tierd_kernels.policy import Budget
from traces import FIELDS, Trace, record
from truth import exact_attention
from variants import BY_NAME, connection


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return tiny.trace(tmp_path_factory.mktemp("trace"))


@pytest.fixture(scope="module", params=["fresh", "committed"])
def trace(request: pytest.FixtureRequest) -> Trace:
    return request.getfixturevalue("fresh") if request.param == "fresh" else Trace(tiny.TRACE)


def test_what_was_answered_is_within_its_bound_of_what_was_recorded(trace: Trace) -> None:
    for layer in range(trace.meta.layers):
        tensors = trace.layer(layer)
        assert tensors["keys"].shape == tensors["values"].shape == (2, tiny.PREFILL + tiny.STEPS, 64)
        for step in range(trace.meta.steps):
            k, v = (tensors[name][:, : trace.seen(step)] for name in ("keys", "values"))
            truth = exact_attention(tensors["queries"][step][:, None], k, v, trace.meta.scale)
            error = (tensors["outputs"][step].double() - truth.output[:, 0]).norm(dim=1)
            assert (error <= tensors["certificate.bound"][step] + truth.noise[:, 0]).all()
            wrong = exact_attention(tensors["queries"][step][:, None], k[:, :-1], v[:, :-1], trace.meta.scale).output[:, 0]
            assert not torch.allclose(wrong, truth.output[:, 0]), "a token less would do as well: the recorded order is not tested"


def test_a_replay_is_the_answer_itself(fresh: Trace) -> None:
    for layer in range(fresh.meta.layers):
        tensors, stored = fresh.layer(layer), fresh.stored(layer)
        for step in range(0, fresh.meta.steps, 5):
            result = stored.attend(tensors["queries"][step], fresh.seen(step), fresh.meta.rtol, Budget())
            assert np.array_equal(result.output[:, 0], tensors["outputs"][step].numpy())
            for name in FIELDS:
                assert np.array_equal(result.certificate[name][:, 0], tensors[f"certificate.{name}"][step].numpy(), equal_nan=True), name


def test_needed_blocks_are_those_whose_originals_were_read(trace: Trace) -> None:
    found = 0
    for layer in range(trace.meta.layers):
        tensors = trace.layer(layer)
        for kind, name in enumerate(("promoted_key_blocks", "promoted_value_blocks")):
            needed, promoted = tensors["needed"][:, kind].bool(), tensors[f"certificate.{name}"]
            inexact = ~tensors["certificate.exact"].view(trace.meta.steps, 2, 2).any(dim=2)
            by_head = promoted.view(trace.meta.steps, 2, 2)
            blocks = needed.sum(dim=1)
            assert (blocks <= by_head.sum(dim=2))[inexact].all() and (blocks >= by_head.amax(dim=2))[inexact].all()
            found += int(blocks.sum())
        shares = tensors["contributions"].float()
        assert (shares >= 0).all() and (shares > 0).any() and shares.isfinite().all()
        assert (shares[tensors["needed"].bool()] > 0).any(), "what was promoted had a share before"
    assert found > 0, "nothing was promoted: the trace shows nothing"


def test_the_committed_trace_is_small() -> None:
    assert sum(file.stat().st_size for file in tiny.TRACE.iterdir()) < 1 << 20


def test_what_is_no_trace_is_named(tmp_path: Path, fresh: Trace) -> None:
    with pytest.raises(ValueError, match=r"no trace\.json"):
        Trace(tmp_path)
    (tmp_path / "trace.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match="format 7; this reader knows 1"):
        Trace(tmp_path)
    with pytest.raises(ValueError, match="layer 2 of a trace of 2 layers"):
        fresh.layer(2)


def test_what_cannot_be_recorded_is_named(tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint()
    with connection(checkpoint.model, 64) as tier:
        with pytest.raises(ValueError, match="'naive' has no certificates"):
            record(checkpoint, BY_NAME["naive"], tier, [1, 2], 1, 1, tmp_path, "")
        with pytest.raises(ValueError, match="one step at least"):
            record(checkpoint, BY_NAME["rtol5"], tier, [1, 2], 2, 1, tmp_path, "")


@settings(max_examples=10)
@given(st.integers(1, 70), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.integers(0, 2**32 - 1))
def test_any_number_of_tokens_is_stored_and_attended_exactly_at_tolerance_zero(tokens: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, tokens, 64, generator=generator).to(dtype) for _ in range(2))
    stored = Stored.of(k, v, 0.125, 16, 16)
    for seen in {1, (tokens + 1) // 2, tokens}:
        q = torch.randn(4, 64, generator=generator).to(dtype)
        result = stored.attend(q, seen, 0.0, Budget())
        truth = exact_attention(q[:, None], k[:, :seen], v[:, :seen], 0.125)
        output = torch.from_numpy(result.output)
        output = output.view(torch.bfloat16) if dtype == torch.bfloat16 else output
        error = (output.double() - truth.output).norm(dim=2)
        assert result.certificate["exact"].all() and (error <= torch.from_numpy(result.certificate["bound"]) + truth.noise).all()


def test_a_replay_over_complete_groups_is_the_session_itself() -> None:
    generator = torch.Generator().manual_seed(4)
    k, v = (torch.randn(1, 2100, 64, generator=generator) for _ in range(2))
    q = torch.randn(2, 1, 64, generator=generator)
    stored = Stored.of(k, v, 0.125, 16, 16)
    terms = {"tolerance": Tolerance(rtol=0.05), "max_tokens": 2100}
    with connect("inproc://", timeout=120.0) as tier, tier.open_session(Geometry(1, 2, 1, 64, "float32", 0.125), **terms) as session:
        for start, seen in ((0, 1030), (1030, 2047), (2047, 2048), (2048, 2100)):
            session.append(layer=0, k=k[:, start:seen], v=v[:, start:seen])
            live, again = session.attend(layer=0, q=q), stored.attend(q[:, 0], seen, 0.05, Budget())
            assert np.array_equal(live.output.numpy(), again.output)
            for name in FIELDS:
                assert np.array_equal(getattr(live.certificate, name), again.certificate[name], equal_nan=True), (seen, name)
