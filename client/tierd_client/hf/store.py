"""The state behind a cache: its sessions, and the forward under way.

A forward visits the layers one after another, and each stores its tokens when it is visited; the cache's length grows only once
all layers have them. A forward that ends early (a call failed, or the model raised elsewhere) leaves layers of different
lengths. That is never built upon: the next use of the cache first cuts every session back to the tokens that all layers hold.
If the failure was not reported by this package, that next use raises IncompleteForward as well, because whoever runs the
model may believe that the forward had counted.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tierd_client.errors import DeadlineExceeded, InvalidArgument, TierdError
from tierd_client.hf.answer import Place, answer_rows, place_of
from tierd_client.hf.batch import Batch
from tierd_client.hf.errors import IncompleteForward, unsupported
from tierd_client.hf.handover import HandOver, offer
from tierd_client.hf.masks import real_tokens
from tierd_client.hf.refusals import Mask, check_dtype, check_head_dim, check_implementation
from tierd_client.hf.summary import Summary, Tally
from tierd_client.session import Session
from tierd_client.tier import Tier
from tierd_client.types import Geometry, PolicyChoice, Tolerance


@dataclass(eq=False)
class Forward:
    """The forward under way: `n` new positions of each of `rows` rows. Once a layer attended: `real` [rows, n], from the mask `mask`, and
    `places`, the same of each row."""

    rows: int
    n: int
    done: set[int] = field(default_factory=set)
    mask: Mask = None
    real: torch.Tensor | None = None
    places: list[Place] = field(default_factory=list)


class Form(NamedTuple):
    """What an attention call says of its session's geometry."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scaling: float | None


@dataclass(frozen=True, eq=False)
class Options:
    """How sessions are opened. `config`: the model's text configuration; `num_layers`: all of which attend."""

    tier: Tier
    config: Any
    num_layers: int
    tolerance: Tolerance
    policy: PolicyChoice
    max_tokens: int


class Store:
    """See the module. Not for several threads at once, as the model is not."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._geometry: Geometry | None = None
        self._form: Form | None = None  # of which that geometry was made
        self._batch: Batch | None = None
        self._tally: Tally | None = None
        self._forward: Forward | None = None
        self._offered: HandOver | None = None
        self._closed = False
        self._forks = 0

    @property
    def seen(self) -> int:
        """Positions that all layers hold, padding included."""
        return 0 if self._batch is None else self._batch.seen

    @property
    def rows(self) -> int:
        """Rows of the batch, 0 before the first forward."""
        return 0 if self._batch is None else len(self._batch.sessions)

    def hand_over(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Offer `key`, `value` [rows, num_kv_heads, n, head_dim] of `layer` to the attention call that follows.

        Raises UnsupportedModel, InvalidArgument or IncompleteForward; see `at_rest`.
        """
        self._check_open()
        self._check_consumed()
        self._check_tensors(layer, key, value)
        rows, _, n, _ = key.shape
        forward = self._forward
        if forward is None or layer in forward.done or (forward.rows, forward.n) != (rows, n):
            self.at_rest()
            self._begin(rows, n)
        self._offered = HandOver(self, layer, key, value)
        offer(self._offered)

    def attend(
        self, handover: HandOver, module: torch.nn.Module, q: torch.Tensor, mask: Mask, scaling: float | None
    ) -> torch.Tensor:
        """Attention [rows, n, num_q_heads, head_dim] of `q` [rows, num_q_heads, n, head_dim]; padding gives zeros.

        Stores the keys and values on the way. Whatever it raises, nothing of the forward will count.
        """
        self._offered = None
        forward = self._forward
        if forward is None:
            raise IncompleteForward("this layer's keys were handed over in a forward that has ended since; run the forward again")
        batch = self._open(q, handover.key, scaling)
        self._read_mask(forward, batch, mask)
        assert forward.real is not None and self._tally is not None
        batch.disturb()
        output = answer_rows(self.options.tier, batch, forward.places, module, handover, q, scaling, self._tally)
        forward.done.add(handover.layer)
        if len(forward.done) == self.options.num_layers:
            batch.extend(forward.real)
            self._forward = None
        return output

    def fail(self, error: BaseException) -> None:
        """The forward ended with `error`, which its caller sees: take its tokens back before anything else is done."""
        self._forward = self._offered = None
        answered = isinstance(error, TierdError) and not isinstance(error, DeadlineExceeded)
        if self._batch is not None and not answered:
            self._batch.doubt()

    def at_rest(self) -> Batch | None:
        """The batch, all layers of the same length; None before the first forward.

        Raises IncompleteForward, after putting things right, if a forward ended early without anybody being told here.
        """
        self._check_open()
        self._check_consumed()
        forward, self._forward = self._forward, None
        if self.seen == 0:
            self._release()
        elif self._batch is not None:
            self._batch.settle()
        if forward is not None and forward.done:
            raise IncompleteForward(
                f"the last forward attended in {len(forward.done)} of the {self.options.num_layers} layers that the configuration "
                f"names; the cache is back at its {self.seen} positions: run the forward again"
            )
        return self._batch

    def copy(self) -> "Store":
        """A store of its own over forks of the sessions, with an empty summary."""
        batch, twin = self.at_rest(), Store(self.options)
        if batch is not None and self._geometry is not None:
            twin._geometry, twin._batch = self._geometry, batch.copy()
            twin._tally = Tally(self._geometry.num_layers, self._geometry.num_q_heads)
        return twin

    def summary(self) -> Summary:
        """What certificates said since the first forward."""
        forks = 0 if self._batch is None else self._batch.forks
        return (self._tally or Tally(self.options.num_layers, 0)).summary(self._forks + forks)

    def reset(self) -> None:
        """Close all sessions and forget everything; the next forward may be of other rows."""
        self._check_open()
        self._release()
        self._tally, self._forks = None, 0

    def close(self) -> None:
        """Close all sessions; a second time does nothing."""
        self._closed = True
        self._release()

    def _release(self) -> None:
        self._forward = self._offered = None
        batch, self._batch = self._batch, None
        if batch is not None:
            self._forks += batch.forks
            batch.close()

    def _begin(self, rows: int, n: int) -> None:
        check_implementation(self.options.config)
        if self._batch is not None and self.rows != rows:
            raise InvalidArgument(
                f"the forward has {rows} rows and the cache {self.rows}; use batch_repeat_interleave, batch_select_indices or reset"
            )
        self._forward = Forward(rows, n)

    def _open(self, q: torch.Tensor, key: torch.Tensor, scaling: float | None) -> Batch:
        """The batch, opened if this is the first attention call. Raises UnsupportedModel for heads or types that are not served, and if
        layers differ in shape or scale."""
        form = Form(q.shape[1], key.shape[1], key.shape[3], key.dtype, scaling)
        if self._batch is not None and form == self._form:
            return self._batch
        dtype = str(form.dtype).removeprefix("torch.")
        check_head_dim(form.head_dim, self.options.tier.limits.head_dims)
        check_dtype(dtype)
        geometry = Geometry(
            num_layers=self.options.num_layers,
            num_q_heads=form.num_q_heads,
            num_kv_heads=form.num_kv_heads,
            head_dim=form.head_dim,
            dtype=dtype,
            softmax_scale=None if scaling is None else float(scaling),
        )
        if self._batch is None:
            self._geometry = geometry
            if self._tally is None:
                self._tally = Tally(geometry.num_layers, geometry.num_q_heads)
            self._batch = Batch.open(key.shape[0], lambda: self._open_session(geometry))
        elif geometry != self._geometry:
            raise unsupported("layers of different shape", f"{geometry} after {self._geometry}; one session has one geometry")
        self._form = form
        return self._batch

    def _open_session(self, geometry: Geometry) -> Session:
        o = self.options
        return o.tier.open_session(geometry, tolerance=o.tolerance, policy=o.policy, max_tokens=o.max_tokens)

    def _read_mask(self, forward: Forward, batch: Batch, mask: Mask) -> None:
        """Layers mostly share one mask, which is then read once."""
        if forward.real is not None and mask is forward.mask:
            return
        real = real_tokens(mask, batch.real, forward.rows, forward.n)
        if forward.real is not None and not torch.equal(real, forward.real):
            raise unsupported("attention mask", "layers were given masks that hide different tokens")
        forward.mask, forward.real, forward.places = mask, real, [place_of(own) for own in real]

    def _check_consumed(self) -> None:
        offered, self._offered = self._offered, None
        if offered is not None:
            self._forward = None
            raise unsupported(
                "attention implementation",
                f"the keys of layer {offered.layer} never reached the attention function 'tierd': the model computes attention by itself",
            )

    def _check_tensors(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if not 0 <= layer < self.options.num_layers:
            raise unsupported("extra layers", f"layer {layer} stores keys; the configuration names {self.options.num_layers} layers")
        if key.ndim != 4 or key.shape != value.shape:
            raise unsupported(
                "values of another shape than keys",
                f"layer {layer} stores keys {list(key.shape)} and values {list(value.shape)}; "
                "both must be [batch, num_kv_heads, tokens, head_dim]",
            )

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidArgument("this cache is closed")
