"""One step of the ladder: all query heads of a few query tokens over one session and layer.

Row h * rows + r belongs to KV head h; r counts (query head of the group, query token), then rows of padding up to whole tiles of
the kernels, which are done from the start. Norms are in units of the KV head (`KVView.unit_H`) until the reply is written.
"""

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.attend.cpu import attend as value_pass
from tierd_kernels.attend.cpu import group_dots, means
from tierd_kernels.bound.annotations import Bound
from tierd_kernels.bound.cpu import NO_FLAGS, certify_set, evaluate, kept_mass, largest_shares, weigh
from tierd_kernels.bound.reference import GROUP_TOKENS
from tierd_kernels.bound.statistics import DELTA, NUM_STATISTICS, SUM
from tierd_kernels.call import Call, Result
from tierd_kernels.canary import canary_failures
from tierd_kernels.dense.cpu import dense
from tierd_kernels.errors import SCORE_MAX, ScoreOverflow
from tierd_kernels.kvview import KVView, narrow, widen
from tierd_kernels.layout import Layout, Memory
from tierd_kernels.numerics import SAFETY, U64, Array
from tierd_kernels.policy import Budget, Coverage
from tierd_kernels.reads import NONE_READ, exact_heads, listed, words_of
from tierd_kernels.score.cpu import NORM_FLOOR, score
from tierd_kernels.select.candidates import largest, near
from tierd_kernels.select.cpu import skip_blocks
from tierd_kernels.select.reference import Mask, cheapest_within, coverage_keys
from tierd_kernels.vector import ROW_TILE
from tierd_kernels.workspace import Workspace

Rows = NDArray[np.int64]
SCORE_CHUNK = 64  # blocks per work item of the score pass; with 8, its working space cost a quarter of the pass
# Stored norms are rounded up to BF16, so a sum of them is too large by this factor at most.
NORM_RETURN = 1.0 / (1.0 + 2.0**-7) - 2.0**-15
FP32_SCORE_MAX = 1e30  # where |q| |k|, or the scale, reaches further, FP32 may overflow on the way: such rows go to float64
SKIP_SHARE_HELD_BACK = 0.1  # masses are relative to the whole when blocks are chosen, to what is kept when the bound is taken
BUDGET_MAX = 1e250  # keeps a budget finite in any unit
BUDGET_MIN = 1e-290  # below, doubles are rounded by more than a budget is lowered for: nothing is allowed
SQUARE_FLOOR = 2.0**-511  # the square of what lies below is not a normal double: norms do not see it
# What a selection aims at, as shares of the budget: the second try is for what the first misjudged.
TARGETS = (0.9, 0.5)
# The fields of a row's certificate that are written when it is within budget, in units of the values.
SETTLED = ("bound", "budget", "key_error", "value_error", "skip_error", "arith_error", "value_norm", "output_norm")


class Step:
    """Holds the arrays of one step while it climbs the ladder; `run` is called once."""

    def __init__(self, layout: Layout, memory: Memory, call: Call, start: int, stop: int, space: Workspace) -> None:
        self.layout, self.memory, self.call = layout, memory, call
        query_heads, total, self.d = call.q.shape
        self.n, self.heads = stop - start, layout.num_kv_heads
        self.used = query_heads // self.heads * self.n
        self.rows = -(-self.used // ROW_TILE) * ROW_TILE
        self.canary = call.canary_blocks if start == 0 else call.canary_blocks[:0]
        seen = call.num_tokens - total + np.arange(start, stop) + 1
        self.num_tokens = int(seen[-1])
        self.visible_R = np.full(self.rows, self.num_tokens, np.int64)
        self.visible_R[: self.used].reshape(-1, self.n)[:] = seen
        self.q_HRd, self.scale_HR = np.zeros((self.heads, self.rows, self.d)), np.ones((self.heads, self.rows))
        q = widen(call.q[:, start:stop], layout.dtype).reshape(self.heads, self.used, self.d)
        scale = float(call.softmax_scale)
        # The scale must stay finite: against keys of zeros any may be asked for.
        exponent = np.minimum(np.frexp(np.max(np.abs(q), axis=2))[1], 1000 - math.frexp(scale)[1])
        self.q_HRd[:, : self.used] = np.ldexp(q, -exponent[..., None])
        self.scale_HR[:, : self.used] = np.ldexp(np.full(exponent.shape, scale), exponent)
        self.num_blocks = -(-self.num_tokens // layout.block_size)
        self.full = min(len(call.hot_offsets), self.num_blocks)
        self.hot_offsets, self.original_offsets = call.hot_offsets[: self.full], call.original_offsets[: self.num_blocks]
        self.key_locations, self.value_locations = call.locations(layout)
        norms = (call.group_value_norms, call.group_error_norms)
        self.view = KVView.of(layout, memory, self.hot_offsets, self.original_offsets, self.num_tokens, norms)
        self.annotations = self.view.annotations(self.rows)

        all_rows = self.heads * self.rows
        self.unit_R = np.repeat(self.view.unit_H, self.rows)
        self.blocks_of_head = (self.heads, self.rows, self.num_blocks)
        groups = -(-self.num_tokens // GROUP_TOKENS)
        self.space = space
        self.weights = space.take("weights", (self.heads, self.rows, self.num_blocks * layout.block_size), np.float32)
        self.weights[:, self.used :] = 0.0
        # Rows that see every block, without padding among them, have all their statistics written; else absent blocks must read zero.
        whole = self.n == 1 and self.used == self.rows
        self.statistics = (space.take if whole else space.zeros)("statistics", (NUM_STATISTICS, all_rows, self.num_blocks), np.float32)
        self.factor = space.zeros("factor", (all_rows, self.num_blocks), np.float64)
        self.partial = space.take("partial", (self.heads, self.rows, groups, self.d), np.float64)
        self.output = np.zeros((all_rows, self.d), call.q.dtype)
        self.output_norm, self.output_error = np.zeros((2, all_rows))
        self.group_dot = np.zeros((all_rows, groups))
        self.key_exact, self.value_exact, self.keep = np.zeros((3, all_rows, self.num_blocks), np.bool_)
        self.contributions = np.zeros((2, len(call.hot_offsets), self.heads), np.float32)
        self.exact, self.promoted = np.zeros(all_rows, np.bool_), False
        self.done = np.zeros(all_rows, np.bool_)
        self.done.reshape(self.heads, -1)[:, self.used :] = True
        self.ranked = np.zeros(all_rows, np.bool_)
        self.settled = np.zeros((len(SETTLED), all_rows))
        self.fields = dict(zip(SETTLED, self.settled, strict=True))
        self.fields["candidate_bound"] = np.full(all_rows, np.inf)
        self.fields["paper_key_bound"] = np.full(all_rows, np.nan)

    def run(self) -> Result:
        """Climbs until every row is certified or exact. Raises ScoreOverflow."""
        with np.errstate(over="ignore", invalid="ignore"):  # a norm of keys beyond FP32 is infinite; such rows do not fit
            reach = np.abs(self.scale_HR) * np.maximum(np.linalg.norm(self.q_HRd, axis=2) * self.view.key_norm_max_H[:, None], 1.0)
        fits = (reach < FP32_SCORE_MAX).reshape(-1) & ~self.done
        failures: list[tuple[int, int]] = []
        if (self.call.rtol > 0 or self.call.atol > 0) and np.any(fits):
            self._score(np.repeat(fits[:, None], self.num_blocks, axis=1))
            failures = self._canary_failures(fits)
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
            self.original_offsets, self.key_locations, self.key_exact.reshape(self.blocks_of_head),
            todo.reshape(self.blocks_of_head), SCORE_CHUNK, self.weights,
            self.statistics.reshape(NUM_STATISTICS, *self.blocks_of_head),
        )  # fmt: skip

    def _measure(self, rows: Rows, everything: bool = False) -> tuple[Array, Array, Array]:
        """Brings the rows' weights to their common scale; needed after scores have changed. Skipping changes nothing: the heaviest
        block stays, so the kept mass is still at least that of the block with the largest score, which is at least 1. Returns the rows'
        masses, and their sums with nu and with eta."""
        mass, norm, error = np.empty((3, len(rows)))
        weigh(self.statistics, rows, everything, self.keep, self.factor, mass, norm, error)
        return mass, norm, error

    def _rank(self, rows: Rows) -> None:
        certified = np.empty(len(rows), np.bool_)
        certify_set(self.statistics, self.factor, rows, NO_FLAGS, certified)
        self.ranked[rows] = certified

    def _attend(self, rows: Rows) -> tuple[Bound, Array]:
        """The value pass over the rows, then their bounds and budgets from what was used."""
        keep = self.keep
        if len(rows) < len(keep):
            keep = np.zeros_like(keep)
            keep[rows] = self.keep[rows]
        value_pass(
            self.layout.as_array, *self.memory, self.visible_R, self.hot_offsets, self.original_offsets,
            self.value_locations, self.view.raw_values_Hb, self.value_exact.reshape(self.blocks_of_head),
            keep.reshape(self.blocks_of_head), self.factor.reshape(self.blocks_of_head), self.weights, self.partial,
        )  # fmt: skip
        mass = np.empty(len(rows))
        kept_mass(self.statistics, self.factor, self.keep, rows, mass)
        unit = self.unit_R[rows]
        with np.errstate(all="ignore"):
            partial, divisor, wide = self.partial.reshape(len(self.done), -1, self.d), mass * unit, np.empty((len(rows), self.d))
            means(partial, rows, divisor, wide)
            group_dots(partial, rows, divisor, self._write(rows, wide), self.group_dot)
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
        return evaluate(
            self.statistics, self.factor, self.annotations, rows, self.keep, self.value_exact, norm, error, dot, keys, values
        )

    def _budgets(self, rows: Rows, bound: Bound, output_norm: Array) -> Array:
        vbar = np.maximum(bound.value_norm * NORM_RETURN - 2.0 * NORM_FLOOR, 0.0)
        return self._budget_of(rows, output_norm if self.call.relative_to == "output" else vbar)

    def _budget_of(self, rows: Rows, reference: Array) -> Array:
        """The budgets, rounded down; NaN, which nothing meets, where the reference is not a number."""
        with np.errstate(over="ignore", invalid="ignore"):
            asked = self.call.atol / self.unit_R[rows] + self.call.rtol * reference
            return np.where(asked < BUDGET_MIN, 0.0, np.minimum(asked * (1.0 - 2.0**-20), BUDGET_MAX))

    # -- policies -------------------------------------------------------------------------------------------------------------

    def _candidate(self, rows: Rows) -> Rows:
        """Candidate bounds and shares of the budget; returns the rows that may be certified at all."""
        mass, norm, error = self._measure(rows, everything=True)
        with np.errstate(all="ignore"):
            upper = (norm + error) / mass * SAFETY  # ||O|| is at most Vbar and the value errors
        bound = self._evaluate(rows, upper, np.zeros(len(rows)), None)
        self.fields["candidate_bound"][rows] = bound.total * self.unit_R[rows]
        self._rank(rows)
        budget = self._budgets(rows, bound, upper)
        largest_shares(bound.key_Rb, bound.value_Rb, budget, self.annotations.head_R[rows], self.contributions[:, : self.full])
        if self.call.relative_to == "values" and isinstance(self.call.policy, Budget) and self.call.policy.skip_share > 0:
            allowance = (1.0 - SKIP_SHARE_HELD_BACK) * self.call.policy.skip_share * budget
            view = self.annotations
            skip_blocks(self.statistics, self.factor, rows, view.head_R, view.value_norm_max_Hb, upper, allowance, self.keep)
        return rows[np.isfinite(bound.total)]

    def _by_budget(self, rows: Rows, policy: Budget) -> None:
        if policy.require_rank:
            rows = rows[self.ranked[rows]]
        rows, bound, budget = self._settle(rows)
        for target in TARGETS:
            if not len(rows):
                return
            self.keep[rows] = self.statistics[SUM, rows] > 0
            norm, error, dot = self.output_norm[rows], self.output_error[rows], self.group_dot[rows]
            keys, values, reachable = cheapest_within(
                self._counted((bound.key_Rb, bound.value_Rb), rows),
                target * budget,
                lambda k, v: self._evaluate(rows, norm, error, dot, k, v).total,  # noqa: B023
            )
            self._promote(rows, keys, values)
            rows, bound, budget = self._settle(rows[reachable])

    @cached_property
    def _favour(self) -> Array:
        """[2, full, Hkv]: how many times its share a key or value record counts where promotion chooses."""
        return np.where(np.stack([self.key_locations, self.value_locations])[:, : self.full] < 0, 1.0, float(self.call.preference))

    def _counted(self, shares: tuple[Array, Array], rows: Rows) -> tuple[Array, Array]:
        """The shares of keys and values [rows, blocks] as promotion ranks them."""
        if self.call.preference == 1 or self.call.in_scratch is None:
            return shares
        keys, values = (x.copy() for x in shares)
        for x, of_kind in zip((keys, values), self._favour, strict=True):
            x[:, : self.full] *= of_kind.T[self.annotations.head_R[rows]]
        return keys, values

    def _by_coverage(self, rows: Rows, policy: Coverage) -> None:
        rho = self.factor[rows] * self.statistics[SUM, rows]
        rho /= rho.sum(axis=1, keepdims=True)
        delta_max = self.statistics[DELTA, rows].max(axis=1).astype(np.float64)
        head = self.annotations.head_R[rows]
        norm_max = np.max(self.view.value_norm_max_Hb, axis=1)[head] * self.unit_R[rows]
        error = self.view.value_error_max(self.layout, self.memory, self.hot_offsets)[head] * self.unit_R[rows, None]
        with np.errstate(invalid="ignore"):  # zero times infinity: the paper's bound says nothing, a block without mass stays
            keys, self.fields["paper_key_bound"][rows] = coverage_keys(rho, delta_max, norm_max, self.keep[rows], policy)
            values = rho * error > policy.v_tol
        self._promote(rows, keys, values)
        self._rank(rows)
        sound = self.ranked[rows]
        if policy.boundary_check:
            apart = np.empty(len(rows), np.bool_)
            certify_set(self.statistics, self.factor, rows, keys, apart)
            sound &= apart
        self._settle(rows[sound])

    def _promote(self, rows: Rows, keys: Mask, values: Mask) -> None:
        stored = np.arange(self.num_blocks) < self.full  # the trailing block is original already
        todo = np.zeros_like(self.key_exact)
        todo[rows] = keys & stored & ~self.key_exact[rows]
        self.promoted = True
        self.key_exact |= todo
        self.value_exact[rows] |= values & stored
        if np.any(todo):
            self._score(todo)
            self._measure(rows)

    def _settle(self, rows: Rows) -> tuple[Rows, Bound, Array]:
        """Attends; rows within budget are done. Returns those that are not, with their bounds and budgets."""
        bound, budget = self._attend(rows)
        good = (bound.total <= budget) & np.isfinite(bound.total) & np.isfinite(self.output_norm[rows])
        self.done[rows[good]] = True
        parts = np.stack((
            bound.total, budget, bound.key, bound.value, bound.skip, bound.arithmetic, bound.value_norm * NORM_RETURN,
            self.output_norm[rows],
        ))  # fmt: skip
        self.settled[:, rows[good]] = parts[:, good] * self.unit_R[rows[good]]
        if np.all(good):
            return rows[:0], bound, budget
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
        rounding = (self.num_tokens + self.d + 16.0) * U64 * (norm + output_norm) + self.output_error[rows] + self.d**0.5 * SQUARE_FLOOR
        with np.errstate(over="ignore", invalid="ignore"):
            grow = np.exp(eps)
            # Weights that underflow float64 are below e^-700 of the largest.
            lost = self.num_tokens * 1e-300 * norm_max
            bound = grow * (np.expm1(eps) * (norm + output_norm) + rounding + lost) * SAFETY
        bound = np.fmin(bound, (norm_max + output_norm) * SAFETY)
        unit = self.unit_R[rows]
        self.fields["bound"][rows] = bound * unit
        self.fields["arith_error"][rows] = bound * unit
        self.fields["budget"][rows] = self._budget_of(rows, output_norm if self.call.relative_to == "output" else norm) * unit
        self.fields["value_norm"][rows] = norm * unit
        self.fields["output_norm"][rows] = output_norm * unit
        for name in ("key_error", "value_error", "skip_error"):
            self.fields[name][rows] = 0.0
        self.fields["candidate_bound"][rows] = np.fmin(self.fields["candidate_bound"][rows], (norm_max + output_norm) * SAFETY * unit)
        self.exact[rows] = self.done[rows] = self.ranked[rows] = True

    def _canary_failures(self, scored_R: Mask) -> list[tuple[int, int]]:
        blocks = self.canary[self.canary < self.full]
        if not len(blocks):
            return []
        allowed = np.where(scored_R[:, None], self.statistics[DELTA], np.inf).reshape(self.blocks_of_head)[:, : self.used]
        return canary_failures(
            self.layout, self.memory, blocks, self.hot_offsets, self.key_locations, self.q_HRd[:, : self.used],
            self.scale_HR[:, : self.used], self.visible_R[: self.used], allowed,
        )  # fmt: skip

    def _result(self, failures: list[tuple[int, int]]) -> Result:
        use = slice(None) if self.used == self.rows else (np.arange(self.heads)[:, None] * self.rows + np.arange(self.used)).reshape(-1)
        exact, keep, by_head = self.exact[use], self.keep[use], (self.heads, self.used, self.full)
        promotions: list[Mask] = []  # of any row, [Hkv, full]
        counts, reads, host = [], NONE_READ, np.where(exact, 2 * self.num_tokens * self.d * self.layout.itemsize, 0)
        for mask, locations in ((self.key_exact, self.key_locations), (self.value_exact, self.value_locations)):
            if not self.promoted and not np.any(exact):  # half a millisecond at 32,768 tokens
                counts.append(np.zeros(len(exact), np.int64))
                continue
            promoted = mask[use]
            counts.append(promoted.sum(axis=1))
            stored = promoted[:, : self.full].reshape(by_head)
            promotions.append(np.any(stored, axis=1))
            cold = locations[: self.full].T[:, None] < 0
            host += np.sum(stored & cold, axis=2).reshape(-1) * self.layout.original_record_bytes
        if promotions:  # what rows promoted that came to be exact was read as well
            reads = listed(words_of(np.stack(promotions)), self.full, exact_heads(exact, self.heads), self.call.in_scratch)
        keys, values = counts
        rung = np.where(values > 0, 2, np.where(keys > 0, 1, 0))
        shape = (self.heads * self.used // self.n, self.n)
        whole_layer = np.broadcast_to(exact.reshape(shape).all(axis=0), shape).reshape(-1)
        rung = np.where(whole_layer, 4, np.where(exact, 3, rung))
        visible = -(-self.visible_R[: self.used] // self.layout.block_size)
        kept = np.count_nonzero(keep, axis=1).reshape(self.heads, -1)
        skipped = np.where(exact, 0, (visible - kept).reshape(-1))
        seen, most = self.contributions[:, : self.full], self.call.candidates_max  # what outlives the step
        favour = self._favour if promotions and isinstance(self.call.policy, Budget) else None
        fields: dict[str, NDArray[np.generic]] = {name: x[use] for name, x in self.fields.items()}
        fields |= {
            "rung": rung, "exact": exact, "rank_certified": self.ranked[use], "promoted_key_blocks": keys,
            "promoted_value_blocks": values, "skipped_blocks": skipped, "host_bytes": host,
        }  # fmt: skip
        return Result(
            self.output[use].reshape(*shape, self.d),
            {name: np.ascontiguousarray(x.reshape(shape)) for name, x in fields.items()},
            reads, lambda: largest(near(seen, np.stack(promotions).transpose(0, 2, 1), favour) if promotions else seen, most), failures,
            self.contributions,
        )  # fmt: skip
