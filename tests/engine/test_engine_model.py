"""The engine beside a trivial model: random commands, faults, corruption and silence, compared after every turn."""

import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from command_fuzz import EXACT, LOOSE, NARROW, WORKERS, CommandFuzz
from fake_kernels import FakeKernels
from scratch_copies import original_at
from session_model import Model

from tierd.clock import ManualClock
from tierd.commands import Append, Attend, CloseWorker, Command, Fork, OpenSession, Row, Status, Truncate
from tierd.engine import Engine, EngineConfig
from tierd.errors import CapacityExceeded, CertificateUnavailable, DeadlineExceeded, InvalidArgument, TierdError, Unavailable

LEASE_S = 100.0
CONFIG = EngineConfig(
    hot_bytes=160 * NARROW.layout().hot_block_bytes,
    originals_bytes=200 * NARROW.layout().original_block_bytes,
    scratch_bytes=200 * NARROW.layout().original_record_bytes,
    sessions_max=6, batch_rows_max=5, max_tokens=2200, canary_share=1.0, lease_s=LEASE_S, migrations_max=60,
)  # fmt: skip


class Machine:
    """One engine, its fake kernels and clock, and the model. Every event ends with `check`."""

    def __init__(self, seed: int) -> None:
        self.model, self.clock, self.kernels = Model(), ManualClock(), FakeKernels(promote_every=1 + seed % 3)
        self.mixed = seed % 2 == 1
        self.kernels.has_device = seed % 5 > 1
        self.engine = Engine(CONFIG, self.clock, self.kernels)
        if seed % 5 > 2:
            self.engine._thread = threading.current_thread()  # which leaves to the next call what tiering has not begun
        self.fuzz = CommandFuzz(seed, self.model, self.mixed)
        self.repaired = self.faults = 0
        self.seen: Counter[str] = Counter()  # what happened, so that a test can tell that it tested something

    # Events

    def turn(self) -> None:
        commands = [self.fuzz.command() for _ in range(self.fuzz.random.choice([1, 1, 2, 4, 6]))]
        for command, outcome in zip(commands, self.run(*commands), strict=True):
            self.settle(command, outcome, alone=len(commands) == 1)

    def too_late(self) -> None:
        late = replace(self.fuzz.command(), deadline=self.clock.now() - 0.5)
        assert type(self.run(late)[0]) is DeadlineExceeded

    def worker_falls_silent(self) -> None:
        silent, other = self.fuzz.random.sample(WORKERS, 2)
        for _ in range(2):
            self.clock.advance(0.6 * LEASE_S)
            self.run(Status(worker=other))
        self.model.close_worker(silent)

    def attend_fails(self) -> None:
        fault = self.fuzz.random.choice([RuntimeError("broken"), ValueError("a score above 3e+38"), None])
        command = self.fuzz.command(Attend, tolerance=LOOSE)
        self.kernels.faults, self.kernels.unkept = ([], True) if fault is None else ([fault], False)
        (outcome,) = self.run(command)
        self.kernels.faults, self.kernels.unkept = [], False
        if not isinstance(command, Attend) or self.model.refusal(command) or isinstance(outcome, CapacityExceeded):
            self.settle(command, outcome, alone=True)
        else:
            self.faults += isinstance(fault, RuntimeError)
            assert type(outcome) is (InvalidArgument if isinstance(fault, ValueError) else CertificateUnavailable)

    def quantising_fails(self) -> None:
        command = self.fuzz.command(Append, Attend)
        self.kernels.quantise_faults = [RuntimeError("broken")]
        (outcome,) = self.run(command)
        failed, self.kernels.quantise_faults = not self.kernels.quantise_faults, []
        if failed:
            self.faults += 1
            assert not self.model.refusal(command) and self.model.needs(command).full.total()
            assert type(outcome) is (Unavailable if isinstance(command, Append) else CertificateUnavailable)
        else:
            self.settle(command, outcome, alone=True)

    def originals_corrupt(self) -> None:
        """Whether attended to or cut into, a full block whose originals changed is refused; nothing else changes."""
        place = self.fuzz.full_block()
        if place is None:
            return
        name, layer, index = place
        session, draw = self.engine.sessions.by_id[name], self.fuzz.random.randrange
        layout, block = session.layout, int(session.layers[layer].ids[index])
        record = original_at(session.table, draw(2), block, draw(layout.num_kv_heads))
        command: Command = Truncate(name, index * layout.block_size + 1 + draw(layout.block_size - 1), worker=session.worker)
        if not self.fuzz.one_in(3):
            command = Attend([self.fuzz.row(name, layer, self.fuzz.random.choice([EXACT, LOOSE]))], worker=session.worker)
        at = record + draw(layout.original_record_bytes)
        self.run()  # what tiering has put off would copy the change
        self.engine.residency.arenas.memory.originals[at] ^= 0x11
        (outcome,) = self.run(command)
        self.engine.residency.arenas.memory.originals[at] ^= 0x11
        refusal = self.model.refusal(command)
        assert type(outcome) in ((refusal,) if refusal else (CertificateUnavailable, CapacityExceeded)), outcome

    def codes_corrupt(self) -> None:
        """A canary finds it, the block is quantised anew and the answer is exact."""
        place = self.fuzz.full_block()
        if place is None:
            return
        name, layer, index = place
        session = self.engine.sessions.by_id[name]
        at = int(session.table.hot_offset[session.layers[layer].ids[index]]) + self.fuzz.random.randrange(16)
        self.engine.residency.arenas.memory.hot[at] ^= 0x11
        q = self.fuzz.numbers(session.geometry.num_q_heads, 1, session.geometry)
        command = Attend([Row(name, layer, q, tolerance=LOOSE)], worker=session.worker)
        assert self.do(command)[0].certificate["exact"].all()
        self.repaired += 1

    # What must hold

    def check(self) -> None:
        self.engine.check_integrity()
        assert self.engine.sessions.by_id.keys() == self.model.sessions.keys()
        arenas, counters = self.engine.residency.arenas, self.engine.counters
        assert (arenas.hot.used_bytes, arenas.originals.used_bytes) == self.model.usage().bytes()
        assert (counters.events["canary_repaired"], counters.events["fault"]) == (self.repaired, self.faults)
        assert counters.events["corrupt_copy"] == 0
        for name, session in self.engine.sessions.by_id.items():
            assert session.lengths == self.model.sessions[name].lengths
            for layer, state in enumerate(session.layers):
                have = state.group_value_norms, state.group_error_norms
                for mine, expected in zip(have, self.model.norms(name, layer), strict=True):
                    np.testing.assert_array_equal(mine, expected)

    def finish(self) -> None:
        """Read everything once more, exactly and from scratch, then close it all: nothing may be left."""
        for name, session in list(self.model.sessions.items()):
            for layer in (i for i, length in enumerate(session.lengths) if length):
                for tolerance in (EXACT, LOOSE):
                    q = self.fuzz.numbers(session.geometry.num_q_heads, 1, session.geometry)
                    self.do(Attend([Row(name, layer, q, tolerance=tolerance)], worker=session.worker))
        for worker in WORKERS:
            self.do(CloseWorker(worker=worker))
        self.run()
        assert [pool.used_bytes for pool in self.engine.residency.arenas.pools] == [0, 0, 0, 0]

    # How

    def do(self, command: Command) -> Any:
        (outcome,) = self.run(command)
        self.settle(command, outcome, alone=True)
        return outcome

    def run(self, *commands: Command) -> list[Any]:
        """Each command's result or exception, after one turn of the engine."""
        futures = [self.engine.submit(command) for command in commands]
        assert self.engine.run_once() == len(commands)
        outcomes = [future.exception(timeout=0) or future.result() for future in futures]
        for command, outcome in zip(commands, outcomes, strict=True):
            how = type(outcome).__name__ if isinstance(outcome, Exception) else "done"
            self.seen[f"{type(command).__name__} {how}"] += 1
        return outcomes

    def settle(self, command: Command, outcome: Any, *, alone: bool) -> None:
        """Compare one command's outcome with what the model says, which then does the same."""
        refusal = self.model.refusal(command)
        if refusal:
            assert type(outcome) is refusal, outcome
        elif isinstance(command, OpenSession) and len(self.model.sessions) < CONFIG.sessions_max and command.max_tokens > CONFIG.max_tokens:
            assert type(outcome) is InvalidArgument
        elif isinstance(command, OpenSession | Fork) and len(self.model.sessions) >= CONFIG.sessions_max:
            assert type(outcome) is CapacityExceeded
        elif isinstance(outcome, CapacityExceeded):
            # Ranges of several sizes may leave holes, and within one turn other sessions' commands may run earlier or later.
            assert self.mixed or not alone or not self.fits(command)
        else:
            assert not isinstance(outcome, TierdError), outcome
            assert self.fits(command) or not alone
            self.model.apply(command, outcome)

    def fits(self, command: Command) -> bool:
        used, more = self.model.usage().bytes(), self.model.needs(command).bytes()
        return used[0] + more[0] <= CONFIG.hot_bytes and used[1] + more[1] <= CONFIG.originals_bytes


EVENTS = {
    Machine.turn: 60, Machine.too_late: 3, Machine.worker_falls_silent: 1, Machine.attend_fails: 6, Machine.quantising_fails: 5,
    Machine.originals_corrupt: 8, Machine.codes_corrupt: 4,
}  # fmt: skip
REACHED = (
    "Append done", "Append CapacityExceeded", "Append Unavailable", "Attend done", "Attend CapacityExceeded",
    "Attend CertificateUnavailable", "Attend InvalidArgument", "Attend SessionNotFound", "Fork done", "Truncate done",
    "Truncate CertificateUnavailable", "CloseWorker done", "hits", "misses", "evicted", "lease_expired", "canary_repaired", "undone",
    "broken_promise", "corrupt_original",
)  # fmt: skip
TOGETHER = 24  # seeds, so many that each of REACHED happens some times


@pytest.mark.parametrize("first", range(0, 48, TOGETHER))
def test_the_engine_does_what_a_trivial_model_does(first: int) -> None:
    happened: Counter[str] = Counter()
    for seed in range(first, first + TOGETHER):
        print(f"seed {seed}")
        machine = Machine(seed)
        for _ in range(150):
            (event,) = machine.fuzz.random.choices(list(EVENTS), list(EVENTS.values()))
            event(machine)
            machine.check()
        machine.finish()
        counters = machine.engine.counters
        happened.update(machine.seen)
        happened.update({name: getattr(counters, name) for name in ("hits", "misses", "evicted")} | counters.events)
    print({what: happened[what] for what in REACHED})
    assert min(happened[what] for what in REACHED) > 3
