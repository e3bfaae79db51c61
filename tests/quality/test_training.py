"""The trainer computes what transformers computes, resumes where it stopped, and its data are what their seed says."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import train
from hypothesis import given, settings
from hypothesis import strategies as st
from model import configuration, create, load
from training import batches, checkpoint, rows, schedule
from training.network import Network
from training.optimisers import Optimisers
from training.quick import exact
from training.run import parse
from vocabulary import END

TINY = {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2}


def busy_model(seed: int = 0) -> torch.nn.Module:
    """No weight is zero."""
    model = create(configuration(**TINY), seed)
    for layer in model.model.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return model


def test_forward_pass_is_that_of_transformers() -> None:
    model = busy_model()
    ids = torch.randint(0, 257, (3, 101), generator=torch.Generator().manual_seed(1))
    loss, right = Network(model, torch.float32, compiled=False)(ids[:, :-1], ids[:, 1:])
    logits = model(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 100)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(right, logits.argmax(-1) == ids[:, 1:])
    assert loss.std() > 0.1  # the model is no constant
    loss.mean().backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    expected.mean().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", batches.KINDS, ids=lambda kind: kind.__name__)
@given(seed=st.integers(0, 2**32), length=st.sampled_from([512, 1024, 2048, 4096]))
@settings(max_examples=15)
def test_rows_fill_their_length_and_answers_weigh_no_more_than_their_share(kind: object, seed: int, length: int) -> None:
    row = kind(length, Random(seed))  # type: ignore[operator]
    ids, weights, answers = batches.pack(row, length)
    assert ids.shape == (length + 1,) and weights.shape == answers.shape == (length,)
    assert ids.min() >= 0 and ids.max() <= END and np.isfinite(weights).all()
    assert (weights == 0).sum() < max(260, length // 4)  # padding
    text = "".join(piece.text for piece in row)[: length + 1]
    assert ids[: len(text)].tolist() == [ord(letter) for letter in text] and (ids[len(text) :] == END).all()
    if answers.any():
        assert weights[answers].min() >= 1 and weights[answers].sum() <= max(rows.ANSWER_SHARE * length * 1.01, answers.sum())


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_answers_of_drills_stand_in_the_text_before_them(seed: int) -> None:
    for kind in (rows.pairs, rows.copies, rows.questions):
        before = ""
        for piece in kind(1500, Random(seed)):
            if piece.answer:
                assert piece.text.strip(f" .{rows.END_TEXT}")[:7] in before  # a period is repeated within its answer
            before += piece.text


def test_a_batch_is_what_its_seed_and_number_say() -> None:
    a, b, c = batches.batch(1, 5, 4, 512), batches.batch(1, 5, 4, 512), batches.batch(1, 6, 4, 512)
    assert np.array_equal(a.ids, b.ids) and np.array_equal(a.weights, b.weights) and not np.array_equal(a.ids, c.ids)
    # Workers make the same batches, in order, from where a run goes on.
    stream = batches.Stream(1, 2048, lambda number: 512, 2, 5)
    try:
        made = iter(stream)
        assert np.array_equal(next(made).ids, a.ids) and np.array_equal(next(made).ids, c.ids)
    finally:
        stream.close()


@given(progress=st.floats(0, 1), seed=st.integers(0, 100), number=st.integers(0, 10**6))
def test_the_schedule_stays_within_its_limits(progress: float, seed: int, number: int) -> None:
    for stages in (schedule.STAGES, schedule.SMOKE_STAGES):
        assert schedule.length(progress, stages, seed, number) in stages[schedule.stage(progress, stages)][1]
        assert schedule.stage(progress, stages) <= schedule.stage(min(1.0, progress + 0.1), stages)
    assert 0 < schedule.rate(progress, number) <= 1
    assert schedule.rate(progress, 10**6) >= schedule.rate(min(1.0, progress + 0.01), 10**6)


def test_the_rate_warms_up_holds_and_ends_low() -> None:
    assert schedule.rate(0.0, 0) < 0.01
    assert schedule.rate(schedule.DECAY_FROM, schedule.WARM_UP_STEPS) == 1.0
    assert schedule.rate(1.0, 10**5) == pytest.approx(schedule.FINAL_RATE)
    for stages in (schedule.STAGES, schedule.SMOKE_STAGES):
        assert [sum(chances.values()) for _, chances in stages] == pytest.approx([1.0] * len(stages))


def step(model: torch.nn.Module, optimisers: Optimisers, seed: int) -> float:
    ids = torch.randint(0, 256, (2, 65), generator=torch.Generator().manual_seed(seed))
    loss = Network(model, torch.float32, compiled=False)(ids[:, :-1], ids[:, 1:])[0].mean()
    loss.backward()
    optimisers.step(0.5)
    return loss.item()


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES_MAX", 200_000)
    model = busy_model()
    optimisers = Optimisers(model)
    for seed in range(3):
        step(model, optimisers, seed)
    checkpoint.write(tmp_path, checkpoint.capture(model, optimisers), checkpoint.Position(7, step=3, batch=4, tokens=384, progress=0.5))
    shards = list(tmp_path.glob("state-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 220_000 for shard in shards)
    assert not list(tmp_path.glob("*.partial"))

    tensors, position = checkpoint.read(tmp_path)
    assert vars(position) == {"seed": 7, "step": 3, "batch": 4, "tokens": 384, "progress": 0.5}
    other = busy_model(1)
    resumed = Optimisers(other)
    checkpoint.restore(other, resumed, tensors)
    # Muon's momentum travels in BF16, so weights agree to its precision times the step.
    for seed in range(3, 6):
        assert step(other, resumed, seed) == pytest.approx(step(model, optimisers, seed), rel=2e-4)
    fresh = busy_model(1)
    started = Optimisers(fresh)
    checkpoint.restore(fresh, started, {name: value for name, value in tensors.items() if name.startswith("weight/")})
    for seed in range(3, 6):
        step(fresh, started, seed)
    assert apart(model, other) < 0.1 * apart(model, fresh)  # the optimisers' state is what makes the difference


def apart(a: torch.nn.Module, b: torch.nn.Module) -> float:
    return sum((p - q).norm().item() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_checkpoint_that_is_broken_or_of_another_model_is_refused(tmp_path: Path) -> None:
    model = busy_model()
    tensors = checkpoint.capture(model, Optimisers(model))
    with pytest.raises(ValueError, match="of another model"):
        checkpoint.restore(create(configuration(**{**TINY, "layers": 1}), 0), Optimisers(model), tensors)
    wide = create(configuration(**{**TINY, "hidden": 128}), 0)
    with pytest.raises(ValueError, match="has shape"):
        checkpoint.restore(wide, Optimisers(wide), tensors)
    tensors["weight/model.norm.weight"][3] = float("nan")
    with pytest.raises(ValueError, match=r"1 tensors are not finite, weight/model\.norm\.weight among them"):
        checkpoint.write(tmp_path, tensors, checkpoint.Position(1))
    with pytest.raises(FileNotFoundError, match=r"holds no position\.json"):
        checkpoint.read(tmp_path)


def test_exact_answers_are_counted_as_greedy_decoding_would_write_them() -> None:
    class Knows:
        """Right everywhere but, in every other row, at the last byte of the answer."""

        def __call__(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            right = torch.ones_like(ids, dtype=torch.bool)
            ends = (targets != END).long().cumsum(1).argmax(1)
            for row in range(0, len(ids), 2):
                right[row, ends[row]] = False
            return right.float(), right

    assert exact(Knows(), "niah_single", 1024, 8, 8192, "cpu") == 0.5  # type: ignore[arg-type]


def test_five_minutes_on_two_cores_make_a_model_that_retrieves() -> None:
    """The model in the test data, which TRAINING.md says how to make: it finds most needles in contexts as long as it was trained on."""
    network = Network(load(Path(__file__).parent / "data" / "tiny"), torch.float32, compiled=False)
    assert exact(network, "niah_single", 512, 20, 4096, "cpu") >= 0.7


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, train.__file__, *arguments], capture_output=True, text=True, timeout=200, check=False)


def test_two_parts_run_end_to_end(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert (done := run("--smoke", "--out", str(first), "--minutes", "0.4", "--part", "1/2")).returncode == 0, done.stderr
    assert (done := run("--smoke", "--out", str(second), "--minutes", "0.4", "--part", "2/2", "--resume", str(first))).returncode == 0, (
        done.stderr
    )
    files = [path for path in second.rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.stat().st_size < 16_000_000 for path in files)
    lines = [json.loads(line) for line in (second / "log.jsonl").read_text().splitlines()]
    assert lines[: len((first / "log.jsonl").read_text().splitlines())] == [
        json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == sorted({line["step"] for line in steps})
    assert [line["progress"] for line in steps] == sorted(line["progress"] for line in steps)
    assert {line["event"] for line in lines if "event" in line} >= {"start", "resumed", "stage", "saved", "perplexity", "end"}
    assert all(torch.isfinite(weight).all() for weight in load(second / "model").parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--part", "2/2"), "every later one needs --resume"),
        (("--part", "1/2", "--resume", "{tmp}"), "every later one needs --resume"),
        (("--part", "3/2"), "not of the form 1/2"),
        (("--part", "2/2", "--resume", "{tmp}"), "the same folder"),
    ],
)
def test_wrong_parts_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train.py", "--smoke", "--out", str(tmp_path), "--minutes", "1", *(text.format(tmp=tmp_path) for text in arguments)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="2"):
        parse("")
    assert message in capsys.readouterr().err
