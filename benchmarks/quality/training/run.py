"""One command of training: reads its arguments, trains until its time is up, leaves state, model and log."""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model as byte_model
import torch

from training import checkpoint, quick, schedule
from training.batches import Batch, Stream
from training.network import Network, attention_of, fastest_backends
from training.optimisers import Optimisers
from training.tally import Tally

CLIP_NORM = 1.0


@dataclass(frozen=True)
class Size:
    """What differs between the real training and the smoke test. Seconds are of wall-clock time, `tokens` per batch."""

    device: str
    dtype: torch.dtype
    compiled: bool
    shape: dict[str, int]
    stages: schedule.Stages
    tokens: int
    workers: int
    log_every: int
    save_every_s: float
    evaluation_s: float
    examples: int

    @property
    def longest(self) -> int:
        return max(self.stages[-1][1])


# 64K tokens a batch fill an H100 (2 rows of 32K) and leave some 10 steps a second on short rows.
REAL = Size("cuda", torch.bfloat16, True, {}, schedule.STAGES, 65_536, 12, 50, 60.0, 40.0, 50)
SMOKE_SHAPE = {"layers": 2, "hidden": 128, "intermediate": 256, "heads": 2, "kv_heads": 1}
SMOKE = Size("cpu", torch.float32, False, SMOKE_SHAPE, schedule.SMOKE_STAGES, 2_048, 1, 5, 5.0, 3.0, 4)
SAVING_S = 2.0


class Log:
    """Lines of JSON in `log.jsonl` of the output folder, and on the terminal."""

    def __init__(self, folder: Path, inherited: Path | None, started: float) -> None:
        self._started = started
        folder.mkdir(parents=True, exist_ok=True)
        before = (inherited / "log.jsonl").read_text() if inherited else ""
        self._file = (folder / "log.jsonl").open("w")
        self._file.write(before)

    def __call__(self, line: dict[str, Any]) -> None:
        text = json.dumps({"s": round(time.monotonic() - self._started, 1), **line})
        self._file.write(text + "\n")
        self._file.flush()
        print(text, flush=True)


class Run:
    """One command's worth of training."""

    def __init__(self, arguments: argparse.Namespace, size: Size, log: Log, started: float) -> None:
        self.size, self.log, self.out = size, log, arguments.out
        self.part, self.parts = arguments.part
        self.ends_at = started + arguments.minutes * 60 - size.evaluation_s - SAVING_S
        self.position = checkpoint.Position(arguments.seed, progress=(self.part - 1) / self.parts)
        state = checkpoint.read(arguments.resume) if arguments.resume else None
        if state:
            self.position = state[1]
            self.log({"event": "resumed", **vars(self.position)})
        self.stream = Stream(self.position.seed, size.tokens, self._next_length, size.workers, self.position.batch)
        self.model = byte_model.create(byte_model.configuration(**size.shape), self.position.seed).to(size.device)
        self.optimisers = Optimisers(self.model)
        if state:
            checkpoint.restore(self.model, self.optimisers, state[0])
        self.network = Network(self.model, size.dtype, size.compiled)
        self.tally = Tally(size.device)
        self.kept = checkpoint.capture(self.model, self.optimisers)

    def warm_up(self) -> None:
        """Compile, on rows of zeros. Where that fails the run goes on without, at perhaps half the speed, and the log says why."""
        ids = torch.zeros(self.size.tokens // 512, 512, dtype=torch.long, device=self.size.device)
        try:
            self.network(ids, ids)[0].mean().backward()  # type: ignore[no-untyped-call]
        except Exception as error:
            if not self.size.compiled:
                raise
            self.log({"event": "not compiled", "error": repr(error)[:4000]})
            self.network = Network(self.model, self.size.dtype, compiled=False)
        self.model.zero_grad(set_to_none=True)
        self.log({"event": "warm"})

    def train(self) -> None:
        """Steps until the time is up; a checkpoint every minute and at the end."""
        begins_at, saved_at, logged = time.monotonic(), time.monotonic(), (time.monotonic(), self.position.tokens)
        batches = iter(self.stream)
        stage = -1
        while (now := time.monotonic()) < self.ends_at:
            gone = (now - begins_at) / (self.ends_at - begins_at)
            self.position.progress = (self.part - 1 + min(1.0, gone)) / self.parts
            if (now_in := schedule.stage(self.position.progress, self.size.stages)) != stage:
                stage = now_in
                self.log({"event": "stage", "stage": stage, "step": self.position.step, "lengths": self.size.stages[stage][1]})
            self._step(batches)
            if self.position.step % self.size.log_every:
                continue
            if not self._log(logged):
                continue
            logged = (time.monotonic(), self.position.tokens)
            if logged[0] - saved_at > self.size.save_every_s:
                self.save()
                saved_at = time.monotonic()

    def _step(self, batches: Any) -> None:
        count = schedule.micro_steps(self.position.progress)
        for _ in range(count):
            batch: Batch = next(batches)
            ids, weights, answers, kinds = (self._moved(array) for array in (batch.ids, batch.weights, batch.answers, batch.kinds))
            loss, right = self.network(ids[:, :-1].long(), ids[:, 1:].long())
            mean = (loss * weights).sum() / weights.sum() / count
            mean.backward()  # type: ignore[no-untyped-call]
            self.tally.add(loss, right, weights, answers, kinds.long())
            self.tally.add_step(mean, 1 / count)
            self.position.batch += 1
            self.position.tokens += loss.numel()
        torch.nn.utils.clip_grad_norm_(self.optimisers.parameters, CLIP_NORM)
        self.optimisers.step(schedule.rate(self.position.progress, self.position.step))
        self.position.step += 1

    def _moved(self, array: Any) -> torch.Tensor:
        """On the device; from pinned memory, so that the copy does not wait for the steps before it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to("cuda", non_blocking=True) if self.size.device == "cuda" else tensor

    def _log(self, last: tuple[float, int]) -> bool:
        """One line of the log. False if the loss was not finite: then the weights are those of the last checkpoint again."""
        report = self.tally.report()  # waits for the device
        rate = schedule.rate(self.position.progress, self.position.step)
        speed = (self.position.tokens - last[1]) / (time.monotonic() - last[0])
        place = {"step": self.position.step, "progress": round(self.position.progress, 4), "tokens": self.position.tokens}
        self.log({**place, "rate": round(rate, 4), "tokens_per_s": round(speed), **report})
        if self.stream.failures:
            self.log({"event": "batches not made", "of": self.position.batch, "errors": self.stream.failures[-3:]})
        if report["loss"] == report["loss"] and abs(report["loss"]) != float("inf"):
            return True
        self.log({"event": "the loss is not finite: back to the last checkpoint's weights, on with new data"})
        checkpoint.restore(self.model, self.optimisers, self.kept)
        return False

    def save(self) -> None:
        """The state to go on from, and the model as it is used."""
        state = checkpoint.capture(self.model, self.optimisers)
        checkpoint.write(self.out, state, self.position)
        self.kept = state
        byte_model.save(self.model, self.out / "model")
        self.log({"event": "saved", "step": self.position.step})

    def evaluate(self) -> None:
        """What the model can do, in the seconds that were kept for it."""
        network = Network(self.model, self.size.dtype, compiled=False)  # its shapes vary: compiling each would take longer
        quick.evaluate(
            network,
            self.size.device,
            self.size.tokens,
            self.size.examples,
            self.size.longest,
            self.ends_at + self.size.evaluation_s,
            self.log,
        )

    def _next_length(self, number: int) -> int:
        return schedule.length(self.position.progress, self.size.stages, self.position.seed, number)


def main(description: str, started: float) -> None:
    """`started`: time.monotonic() when the command began; --minutes counts from there."""
    arguments = parse(description)
    size = SMOKE if arguments.smoke else REAL
    if size.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU here: training needs one (--smoke runs every part on the CPU)")
    log = Log(arguments.out, arguments.resume, started)
    log({"event": "start", "seed": arguments.seed, "part": arguments.part, "minutes": arguments.minutes, "torch": torch.__version__})
    run = Run(arguments, size, log, started)
    try:
        backends: list[Any] = []
        if size.device == "cuda":
            backends, report = fastest_backends(run.model.config, [64, 512, 4096, 32768], size.tokens)
            log({"event": "attention", "gpu": torch.cuda.get_device_name(), "first": backends[0].name, "ms": report})
        with attention_of(backends):
            run.warm_up()
            run.train()
            run.save()
            run.evaluate()
        log({"event": "end", **vars(run.position)})
    except BaseException as error:
        log({"event": "failed", "error": repr(error)[:2000], **vars(run.position)})
        raise
    finally:
        run.stream.close()


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for state, model and log; seven files, none over 16 MB")
    parser.add_argument("--resume", type=Path, help="output folder of the part before")
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock limit of this command, everything included")
    parser.add_argument("--part", type=_part, default=(1, 1), help="which part of how many, as 1/2: the schedule spans all (default 1/1)")
    parser.add_argument("--seed", type=int, default=1, help="of the first part; later parts go on with it")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    arguments = parser.parse_args()
    if (arguments.resume is None) != (arguments.part[0] == 1):
        parser.error("the first part starts anew, and every later one needs --resume with the folder of the part before")
    if arguments.resume and arguments.resume.resolve() == arguments.out.resolve():
        parser.error("--out and --resume are the same folder: a part would overwrite what it started from")
    return arguments


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1/2")
    return int(part), int(parts)
