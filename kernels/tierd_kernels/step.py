"""One step of the ladder: all query heads of a few query tokens over one session and layer.

Row h * rows + r belongs to KV head h; r counts (query head of the group, query token). Norms are in units of the KV head
(`KVView.unit_H`) until the reply is written.
"""

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.attend.cpu import attend as value_pass
from tierd_kernels.bound.reference import (
    D_NORM,
    DELTA,
    EPSILON,
    GROUP_TOKENS,
    MAX_SCORE,
    NUM_STATISTICS,
    SUM,
    Bound,
    evaluate,
    top_block_certified,
)
from tierd_kernels.call import Call, Result
from tierd_kernels.dense.cpu import dense
from tierd_kernels.errors import SCORE_MAX, ScoreOverflow
from tierd_kernels.kvview import KVView, narrow, widen
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.numerics import SAFETY, U64, Array
from tierd_kernels.policy import Budget, Coverage
from tierd_kernels.score.cpu import NORM_FLOOR, score, score_gamma
from tierd_kernels.select.reference import Mask, cheapest_within, coverage_keys, skip_blocks

Rows = NDArray[np.int64]
SCORE_CHUNK = 16  # blocks per work item of the score pass
# Stored norms are rounded up to BF16, so a sum of them is too large by this factor at most.
NORM_RETURN = 1.0 / (1.0 + 2.0**-7) - 2.0**-15
FP32_SCORE_MAX = 1e30  # where |q| |k| reaches further, FP32 may overflow on the way: such rows go straight to float64
# What a selection aims at, as shares of the budget: the second try is for what the first misjudged.
TARGETS = (0.9, 0.5)


class Step:
    """Holds the arrays of one step while it climbs the ladder; `run` is called once."""

    def __init__(self, layout: Layout, memory: Memory, call: Call, start: int, stop: int) -> None:
        self.layout, self.memory, self.call = layout, memory, call
        query_heads, total, self.d = call.q.shape
        self.n, self.heads = stop - start, layout.num_kv_heads
        self.rows = query_heads // self.heads * self.n
        self.canary = call.canary_blocks if start == 0 else call.canary_blocks[:0]
        seen = call.num_tokens - total + np.arange(start, stop) + 1
        self.num_tokens = int(seen[-1])
        self.visible_R = np.tile(seen, self.rows // self.n).astype(np.int64)
        q = widen(call.q[:, start:stop], layout.dtype).reshape(self.heads, self.rows, self.d)
        exponent = np.frexp(np.max(np.abs(q), axis=2))[1]
        self.q_HRd = np.ldexp(q, -exponent[..., None])
        self.scale_HR = np.ldexp(np.full(exponent.shape, float(call.softmax_scale)), exponent)
        self.num_blocks = -(-self.num_tokens // layout.block_size)
        self.full = min(len(call.hot_offsets), self.num_blocks)
        self.hot_offsets, self.original_offsets = call.hot_offsets[: self.full], call.original_offsets[: self.num_blocks]
        norms = (call.group_value_norms, call.group_error_norms)
        self.view = KVView.of(layout, memory, self.hot_offsets, self.original_offsets, self.num_tokens, norms)
        self.annotations = self.view.annotations(self.rows)

        all_rows = self.heads * self.rows
        self.unit_R = np.repeat(self.view.unit_H, self.rows)
        self.blocks_of_head = (self.heads, self.rows, self.num_blocks)
        groups = -(-self.num_tokens // GROUP_TOKENS)
        self.scores = np.zeros((self.heads, self.rows, self.num_blocks * layout.block_size), np.float32)
        self.statistics = np.zeros((all_rows, self.num_blocks, NUM_STATISTICS))
        self.partial, self.mass = np.zeros((self.heads, self.rows, groups, self.d)), np.zeros((self.heads, self.rows, groups))
        self.output = np.zeros((all_rows, self.d), call.q.dtype)
        self.output_norm, self.output_error = np.zeros(all_rows), np.zeros(all_rows)
        self.group_dot = np.zeros((all_rows, groups))
        self.key_exact = np.zeros((all_rows, self.num_blocks), np.bool_)
        self.value_exact, self.keep = self.key_exact.copy(), self.key_exact.copy()
        self.shares = np.zeros((2, all_rows, self.num_blocks), np.float32)
        self.done, self.exact = np.zeros(all_rows, np.bool_), np.zeros(all_rows, np.bool_)
        self.ranked = np.zeros(all_rows, np.bool_)
        names = ["bound", "budget", "key_error", "value_error", "skip_error", "arith_error", "value_norm", "output_norm"]
        self.fields = {name: np.zeros(all_rows) for name in names}
        self.fields["candidate_bound"] = np.full(all_rows, np.inf)
        self.fields["paper_key_bound"] = np.full(all_rows, np.nan)

    def run(self) -> Result:
        """Climbs until every row is certified or exact. Raises ScoreOverflow."""
        reach = np.abs(self.scale_HR) * np.linalg.norm(self.q_HRd, axis=2) * self.view.key_norm_max_H[:, None]
        fits = (reach < FP32_SCORE_MAX).reshape(-1)
        failures: list[tuple[int, int]] = []
        if (self.call.rtol > 0 or self.call.atol > 0) and np.any(fits):
            todo = np.repeat(fits[:, None], self.num_blocks, axis=1)
            self._score(todo)
            failures = self._canary_failures(todo)
            rows = self._candidate(np.flatnonzero(fits))
            policy = self.call.policy
            if isinstance(policy, Coverage):
                self._by_coverage(rows, policy)
            else:
                self._by_budget(rows, policy)
        self._dense(np.flatnonzero(~self.done))
        return self._result(failures)

    # -- passes ---------------------------------------------------------------------------------------------------------------

    def _score(self, todo: Mask) -> None:
        score(
            self.layout.as_array, *self.memory, self.q_HRd, self.scale_HR, self.visible_R, self.view.unit_H, self.hot_offsets,
            self.original_offsets, self.call.key_locations, self.key_exact.reshape(self.blocks_of_head),
            todo.reshape(self.blocks_of_head), score_gamma(self.d), SCORE_CHUNK, self.scores,
            self.statistics.reshape(*self.blocks_of_head, NUM_STATISTICS),
        )  # fmt: skip

    def _attend(self, rows: Rows) -> tuple[Bound, Array]:
        """The value pass over the rows, then their bounds and budgets from what was used."""
        marked = np.zeros(len(self.done), np.uint8)
        marked[rows] = 1
        top = np.max(np.where(self.keep, self.statistics[..., MAX_SCORE], -np.inf), axis=1)
        value_pass(
            self.layout.as_array, *self.memory, self.visible_R, self.hot_offsets, self.original_offsets,
            self.call.value_locations, self.keep.reshape(self.blocks_of_head), self.value_exact.reshape(self.blocks_of_head),
            marked.reshape(self.heads, self.rows), self.scores, top.reshape(self.heads, self.rows), self.partial, self.mass,
        )  # fmt: skip
        unit = self.unit_R[rows, None]
        with np.errstate(all="ignore"):
            mass = self.mass.reshape(len(self.done), -1)[rows].sum(axis=1)[:, None]
            grouped = self.partial.reshape(len(self.done), -1, self.d)[rows] / mass[..., None] / unit[..., None]
            stored = self._write(rows, grouped.sum(axis=1))
            self.group_dot[rows] = np.einsum("rgd,rd->rg", grouped, stored)
        bound = self._evaluate(rows, self.output_norm[rows], self.output_error[rows], self.group_dot[rows])
        return bound, self._budgets(rows, bound, self.output_norm[rows])

    def _write(self, rows: Rows, wide: Array) -> Array:
        """Rounds outputs (in units) to their type and notes the rounding; returns the rounded outputs in units."""
        unit = self.unit_R[rows, None]
        self.output[rows] = narrow(wide * unit, self.layout.dtype)
        stored = widen(self.output[rows], self.layout.dtype) / unit
        self.output_norm[rows] = np.linalg.norm(stored, axis=1)
        self.output_error[rows] = np.linalg.norm(stored - wide, axis=1) * (1.0 + 2.0**-40)
        return stored

    def _evaluate(
        self, rows: Rows, norm: Array, error: Array, dot: Array | None, keys: Mask | None = None, values: Mask | None = None
    ) -> Bound:
        """The rows' bounds as they stand, or as they would be with `keys` and `values` promoted too."""
        statistics, value_exact = self.statistics[rows], self.value_exact[rows]
        if keys is not None:
            statistics = statistics.copy()
            eps = statistics[..., EPSILON]
            statistics[..., DELTA] = np.where(keys, eps, statistics[..., DELTA])
            statistics[..., D_NORM] = np.where(keys, np.sqrt(self.layout.block_size) * eps, statistics[..., D_NORM])
        if values is not None:
            value_exact = value_exact | values
        return evaluate(statistics, self.annotations.take(rows), self.keep[rows], value_exact, norm, error, dot)

    def _budgets(self, rows: Rows, bound: Bound, output_norm: Array) -> Array:
        vbar = np.maximum(bound.value_norm * NORM_RETURN - 2.0 * NORM_FLOOR, 0.0)
        relative = output_norm if self.call.relative_to == "output" else vbar
        with np.errstate(invalid="ignore"):
            return np.asarray((self.call.atol / self.unit_R[rows] + self.call.rtol * relative) * (1.0 - 2.0**-20))

    # -- policies -------------------------------------------------------------------------------------------------------------

    def _candidate(self, rows: Rows) -> Rows:
        """Candidate bounds and shares of the budget; returns the rows that may be certified at all."""
        self.keep[rows] = self.statistics[rows, :, SUM] > 0
        zero = np.zeros(len(rows))
        first = self._evaluate(rows, zero, zero, None)
        upper = (first.value_norm + first.value) * SAFETY  # ||O|| is at most Vbar and the value error
        bound = self._evaluate(rows, upper, zero, None)
        self.fields["candidate_bound"][rows] = bound.total * self.unit_R[rows]
        self.ranked[rows] = top_block_certified(self.statistics[rows])
        budget = self._budgets(rows, bound, upper)[:, None]
        with np.errstate(all="ignore"):
            for i, share in enumerate((bound.key_Rb, bound.value_Rb)):
                self.shares[i, rows] = np.nan_to_num(np.minimum(share / budget, 3e38), nan=0.0)
        if self.call.relative_to == "values" and isinstance(self.call.policy, Budget) and self.call.policy.skip_share > 0:
            allowance = self.call.policy.skip_share * budget[:, 0]
            self.keep[rows] &= ~skip_blocks(
                self.statistics[rows], self.keep[rows], self.annotations.value_norm_max_Rb[rows], upper, allowance
            )
        return rows[np.isfinite(bound.total)]

    def _by_budget(self, rows: Rows, policy: Budget) -> None:
        if policy.require_rank:
            rows = rows[self.ranked[rows]]
        rows, bound, budget = self._settle(rows)
        for target in TARGETS:
            if not len(rows):
                return
            self.keep[rows] = self.statistics[rows, :, SUM] > 0
            norm, error, dot = self.output_norm[rows], self.output_error[rows], self.group_dot[rows]
            keys, values, reachable = cheapest_within(
                (bound.key_Rb, bound.value_Rb),
                target * budget,
                lambda k, v: self._evaluate(rows, norm, error, dot, k, v).total,  # noqa: B023
            )
            self._promote(rows, keys, values)
            rows, bound, budget = self._settle(rows[reachable])

    def _by_coverage(self, rows: Rows, policy: Coverage) -> None:
        keys, tail = coverage_keys(self.statistics[rows], self.keep[rows], policy)
        top_norm = np.max(self.annotations.value_norm_max_Rb[rows], axis=1) * self.unit_R[rows]
        self.fields["paper_key_bound"][rows] = 2.0 * top_norm * tail
        mass = np.exp(self.statistics[rows, :, MAX_SCORE] - np.max(self.statistics[rows, :, MAX_SCORE], axis=1, keepdims=True))
        mass *= self.statistics[rows, :, SUM]
        rho = mass / mass.sum(axis=1, keepdims=True)
        error = np.repeat(self.view.value_error_max_Hb, self.rows, axis=0)[rows]
        self._promote(rows, keys, rho * error * self.unit_R[rows, None] > policy.v_tol)
        self.ranked[rows] = top_block_certified(self.statistics[rows])
        self._settle(rows[self.ranked[rows]])

    def _promote(self, rows: Rows, keys: Mask, values: Mask) -> None:
        stored = np.arange(self.num_blocks) < self.full  # the trailing block is original already
        todo = np.zeros_like(self.key_exact)
        todo[rows] = keys & stored & ~self.key_exact[rows]
        self.key_exact |= todo
        self.value_exact[rows] |= values & stored
        if np.any(todo):
            self._score(todo)

    def _settle(self, rows: Rows) -> tuple[Rows, Bound, Array]:
        """Attends; rows within budget are done. Returns those that are not, with their bounds and budgets."""
        bound, budget = self._attend(rows)
        good = (bound.total <= budget) & np.isfinite(bound.total) & np.isfinite(self.output_norm[rows])
        now, unit = rows[good], self.unit_R[rows[good]]
        self.done[now] = True
        parts = {
            "bound": bound.total, "budget": budget, "key_error": bound.key, "value_error": bound.value, "skip_error": bound.skip,
            "arith_error": bound.arithmetic, "value_norm": bound.value_norm * NORM_RETURN, "output_norm": self.output_norm[rows],
        }  # fmt: skip
        for name, part in parts.items():
            self.fields[name][now] = part[good] * unit
        left = Bound(*(np.asarray(getattr(bound, name))[~good] for name in Bound.__dataclass_fields__))
        return rows[~good], left, budget[~good]

    # -- the last rungs, the canary, the reply ---------------------------------------------------------------------------------

    def _dense(self, rows: Rows) -> None:
        if not len(rows):
            return
        out, facts = np.zeros((len(rows), self.d)), np.zeros((len(rows), 4))
        dense(
            self.layout.as_array, self.memory.originals, rows // self.rows, rows % self.rows, self.q_HRd, self.scale_HR,
            self.visible_R, self.view.unit_H, self.original_offsets, out, facts,
        )  # fmt: skip
        top, norm, norm_max, eps = facts.T
        if not np.all(top <= SCORE_MAX):
            raise ScoreOverflow(f"a score of {np.nanmax(top):.3g} is above {SCORE_MAX:g}, the largest that is answered")
        self._write(rows, out)
        output_norm = self.output_norm[rows]
        rounding = (self.num_tokens + self.d + 16.0) * U64 * (norm + output_norm) + self.output_error[rows]
        with np.errstate(over="ignore", invalid="ignore"):
            grow = np.exp(eps)
            # Weights that underflow float64 are below e^-700 of the largest.
            lost = self.num_tokens * 1e-300 * norm_max
            bound = grow * (np.expm1(eps) * (norm + output_norm) + rounding + lost) * SAFETY
        bound = np.fmin(bound, (norm_max + output_norm) * SAFETY)
        unit = self.unit_R[rows]
        relative = output_norm if self.call.relative_to == "output" else norm
        self.fields["bound"][rows] = bound * unit
        self.fields["arith_error"][rows] = bound * unit
        self.fields["budget"][rows] = (self.call.atol + self.call.rtol * relative * unit) * (1.0 - 2.0**-20)
        self.fields["value_norm"][rows] = norm * unit
        self.fields["output_norm"][rows] = output_norm * unit
        for name in ("key_error", "value_error", "skip_error"):
            self.fields[name][rows] = 0.0
        self.fields["candidate_bound"][rows] = np.fmin(self.fields["candidate_bound"][rows], (norm_max + output_norm) * SAFETY * unit)
        self.exact[rows] = self.done[rows] = True
        self.ranked[rows] = True
        self.keep[rows] = True

    def _canary_failures(self, todo: Mask) -> list[tuple[int, int]]:
        """(block, KV head) whose original keys contradict Delta: codes, annotations or originals are corrupt."""
        blocks = self.canary[self.canary < self.full]
        if not len(blocks):
            return []
        scores, statistics = self.scores.copy(), self.statistics.copy()
        chosen = np.zeros_like(todo)
        chosen[:, blocks] = todo[:, blocks]
        before, self.key_exact = self.key_exact, chosen
        self._score(chosen)
        difference = np.abs(self.scores.astype(np.float64) - scores)
        allowed = statistics[..., DELTA] + self.statistics[..., EPSILON]
        self.key_exact, self.scores, self.statistics = before, scores, statistics
        B = self.layout.block_size
        failures = []
        for b in blocks:
            worst = np.zeros((self.heads, self.rows))
            for r in range(self.rows):
                count = min(B, int(self.visible_R[r]) - int(b) * B)
                if count > 0:
                    worst[:, r] = np.max(difference[:, r, b * B : b * B + count], axis=1)
            limit = allowed[:, b].reshape(self.heads, self.rows)
            bad = ~(worst <= limit) & todo[:, b].reshape(self.heads, self.rows)
            failures += [(int(b), int(h)) for h in np.flatnonzero(np.any(bad, axis=1))]
        return failures

    def _result(self, failures: list[tuple[int, int]]) -> Result:
        # Rows that were answered exactly read every original; what they promoted on the way up was read as well.
        reads = []
        host = np.zeros(len(self.done), np.int64)
        for promoted, locations in ((self.key_exact, self.call.key_locations), (self.value_exact, self.call.value_locations)):
            by_head = promoted[:, : self.full].reshape(self.heads, self.rows, self.full)
            reads.append((np.any(by_head, axis=1) | np.any(self.exact.reshape(self.heads, self.rows), axis=1)[:, None]).T)
            cold = np.repeat(locations[: self.full].T < 0, self.rows, axis=0)
            host += np.sum(promoted[:, : self.full] & cold, axis=1) * self.layout.original_record_bytes
        host += np.where(self.exact, 2 * self.num_tokens * self.d * self.layout.itemsize, 0)
        keys, values = self.key_exact.sum(axis=1), self.value_exact.sum(axis=1)
        rung = np.where(values > 0, 2, np.where(keys > 0, 1, 0))
        rung = np.where(self.exact, 4 if np.all(self.exact) else 3, rung)
        present = np.repeat((np.arange(self.num_blocks) * self.layout.block_size)[None, :], self.rows, axis=0) < self.visible_R[:, None]
        skipped = np.sum(np.tile(present, (self.heads, 1)) & ~self.keep, axis=1)
        fields: dict[str, NDArray[np.generic]] = dict(self.fields)
        fields |= {
            "rung": rung, "exact": self.exact, "rank_certified": self.ranked, "promoted_key_blocks": keys,
            "promoted_value_blocks": values, "skipped_blocks": np.where(self.exact, 0, skipped), "host_bytes": host,
        }  # fmt: skip
        shape = (self.heads * self.rows // self.n, self.n)
        padded = np.zeros((2, len(self.call.hot_offsets), self.heads), np.float32)
        padded[:, : self.full] = self.shares[:, :, : self.full].reshape(2, self.heads, self.rows, self.full).max(axis=2).transpose(0, 2, 1)
        full_reads = [np.zeros((len(self.call.hot_offsets), self.heads), np.bool_) for _ in range(2)]
        for whole, part in zip(full_reads, reads, strict=True):
            whole[: self.full] = part
        return Result(
            self.output.reshape(*shape, self.d),
            {name: np.ascontiguousarray(x.reshape(shape)) for name, x in fields.items()},
            full_reads[0], full_reads[1], padded, failures,
        )  # fmt: skip
