from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]

class RelativeTo(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VALUES: _ClassVar[RelativeTo]
    OUTPUT: _ClassVar[RelativeTo]
DTYPE_UNSPECIFIED: DType
FLOAT16: DType
BFLOAT16: DType
FLOAT32: DType
VALUES: RelativeTo
OUTPUT: RelativeTo

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "inline")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    inline: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., inline: _Optional[bytes] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("message_bytes_max", "max_tokens", "stream_requests_max", "timeout_s_max", "head_dims")
    MESSAGE_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STREAM_REQUESTS_MAX_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_MAX_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIMS_FIELD_NUMBER: _ClassVar[int]
    message_bytes_max: int
    max_tokens: int
    stream_requests_max: int
    timeout_s_max: float
    head_dims: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, message_bytes_max: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stream_requests_max: _Optional[int] = ..., timeout_s_max: _Optional[float] = ..., head_dims: _Optional[_Iterable[int]] = ...) -> None: ...

class HandshakeRequest(_message.Message):
    __slots__ = ("protocol", "client")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client: str
    def __init__(self, protocol: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class HandshakeReply(_message.Message):
    __slots__ = ("protocol", "worker", "epoch", "limits", "backend")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    worker: str
    epoch: str
    limits: Limits
    backend: str
    def __init__(self, protocol: _Optional[int] = ..., worker: _Optional[str] = ..., epoch: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., backend: _Optional[str] = ...) -> None: ...

class Geometry(_message.Message):
    __slots__ = ("num_layers", "num_q_heads", "num_kv_heads", "head_dim", "dtype", "softmax_scale", "block_size", "value_group")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SOFTMAX_SCALE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    VALUE_GROUP_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: DType
    softmax_scale: float
    block_size: int
    value_group: int
    def __init__(self, num_layers: _Optional[int] = ..., num_q_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., softmax_scale: _Optional[float] = ..., block_size: _Optional[int] = ..., value_group: _Optional[int] = ...) -> None: ...

class Tolerance(_message.Message):
    __slots__ = ("rtol", "atol", "relative_to")
    RTOL_FIELD_NUMBER: _ClassVar[int]
    ATOL_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_TO_FIELD_NUMBER: _ClassVar[int]
    rtol: float
    atol: float
    relative_to: RelativeTo
    def __init__(self, rtol: _Optional[float] = ..., atol: _Optional[float] = ..., relative_to: _Optional[_Union[RelativeTo, str]] = ...) -> None: ...

class BudgetPolicy(_message.Message):
    __slots__ = ("skip_share", "require_rank")
    SKIP_SHARE_FIELD_NUMBER: _ClassVar[int]
    REQUIRE_RANK_FIELD_NUMBER: _ClassVar[int]
    skip_share: float
    require_rank: bool
    def __init__(self, skip_share: _Optional[float] = ..., require_rank: _Optional[bool] = ...) -> None: ...

class CoveragePolicy(_message.Message):
    __slots__ = ("tau_cov", "k_min", "k_max", "key_bound_max", "v_tol", "boundary_check")
    TAU_COV_FIELD_NUMBER: _ClassVar[int]
    K_MIN_FIELD_NUMBER: _ClassVar[int]
    K_MAX_FIELD_NUMBER: _ClassVar[int]
    KEY_BOUND_MAX_FIELD_NUMBER: _ClassVar[int]
    V_TOL_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_CHECK_FIELD_NUMBER: _ClassVar[int]
    tau_cov: float
    k_min: int
    k_max: int
    key_bound_max: float
    v_tol: float
    boundary_check: bool
    def __init__(self, tau_cov: _Optional[float] = ..., k_min: _Optional[int] = ..., k_max: _Optional[int] = ..., key_bound_max: _Optional[float] = ..., v_tol: _Optional[float] = ..., boundary_check: _Optional[bool] = ...) -> None: ...

class OpenSessionRequest(_message.Message):
    __slots__ = ("geometry", "tolerance", "budget", "coverage", "max_tokens")
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    geometry: Geometry
    tolerance: Tolerance
    budget: BudgetPolicy
    coverage: CoveragePolicy
    max_tokens: int
    def __init__(self, geometry: _Optional[_Union[Geometry, _Mapping]] = ..., tolerance: _Optional[_Union[Tolerance, _Mapping]] = ..., budget: _Optional[_Union[BudgetPolicy, _Mapping]] = ..., coverage: _Optional[_Union[CoveragePolicy, _Mapping]] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class OpenSessionReply(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseSessionReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("header", "k", "v")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    header: AppendHeader
    k: Tensor
    v: Tensor
    def __init__(self, header: _Optional[_Union[AppendHeader, _Mapping]] = ..., k: _Optional[_Union[Tensor, _Mapping]] = ..., v: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class AppendHeader(_message.Message):
    __slots__ = ("session_id", "layer", "num_tokens")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layer: int
    num_tokens: int
    def __init__(self, session_id: _Optional[str] = ..., layer: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class AppendReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Row(_message.Message):
    __slots__ = ("session_id", "layer", "q", "k", "v", "tolerance")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    tolerance: Tolerance
    def __init__(self, session_id: _Optional[str] = ..., layer: _Optional[int] = ..., q: _Optional[_Union[Tensor, _Mapping]] = ..., k: _Optional[_Union[Tensor, _Mapping]] = ..., v: _Optional[_Union[Tensor, _Mapping]] = ..., tolerance: _Optional[_Union[Tolerance, _Mapping]] = ...) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[Row]
    def __init__(self, rows: _Optional[_Iterable[_Union[Row, _Mapping]]] = ...) -> None: ...

class AttendReply(_message.Message):
    __slots__ = ("rows", "queue_s", "compute_s")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[RowResult]
    queue_s: float
    compute_s: float
    def __init__(self, rows: _Optional[_Iterable[_Union[RowResult, _Mapping]]] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ...) -> None: ...

class RowResult(_message.Message):
    __slots__ = ("output", "certificate", "late_records", "prefetch_wait_s")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    LATE_RECORDS_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    output: Tensor
    certificate: Certificate
    late_records: int
    prefetch_wait_s: float
    def __init__(self, output: _Optional[_Union[Tensor, _Mapping]] = ..., certificate: _Optional[_Union[Certificate, _Mapping]] = ..., late_records: _Optional[int] = ..., prefetch_wait_s: _Optional[float] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("bound", "budget", "key_error", "value_error", "skip_error", "arith_error", "candidate_bound", "rung", "exact", "value_norm", "output_norm", "rank_certified", "promoted_key_blocks", "promoted_value_blocks", "skipped_blocks", "host_bytes", "paper_key_bound")
    BOUND_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    KEY_ERROR_FIELD_NUMBER: _ClassVar[int]
    VALUE_ERROR_FIELD_NUMBER: _ClassVar[int]
    SKIP_ERROR_FIELD_NUMBER: _ClassVar[int]
    ARITH_ERROR_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_BOUND_FIELD_NUMBER: _ClassVar[int]
    RUNG_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    VALUE_NORM_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_NORM_FIELD_NUMBER: _ClassVar[int]
    RANK_CERTIFIED_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_KEY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_VALUE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAPER_KEY_BOUND_FIELD_NUMBER: _ClassVar[int]
    bound: bytes
    budget: bytes
    key_error: bytes
    value_error: bytes
    skip_error: bytes
    arith_error: bytes
    candidate_bound: bytes
    rung: bytes
    exact: bytes
    value_norm: bytes
    output_norm: bytes
    rank_certified: bytes
    promoted_key_blocks: bytes
    promoted_value_blocks: bytes
    skipped_blocks: bytes
    host_bytes: bytes
    paper_key_bound: bytes
    def __init__(self, bound: _Optional[bytes] = ..., budget: _Optional[bytes] = ..., key_error: _Optional[bytes] = ..., value_error: _Optional[bytes] = ..., skip_error: _Optional[bytes] = ..., arith_error: _Optional[bytes] = ..., candidate_bound: _Optional[bytes] = ..., rung: _Optional[bytes] = ..., exact: _Optional[bytes] = ..., value_norm: _Optional[bytes] = ..., output_norm: _Optional[bytes] = ..., rank_certified: _Optional[bytes] = ..., promoted_key_blocks: _Optional[bytes] = ..., promoted_value_blocks: _Optional[bytes] = ..., skipped_blocks: _Optional[bytes] = ..., host_bytes: _Optional[bytes] = ..., paper_key_bound: _Optional[bytes] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("id", "timeout_s", "attend")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    ATTEND_FIELD_NUMBER: _ClassVar[int]
    id: int
    timeout_s: float
    attend: AttendRequest
    def __init__(self, id: _Optional[int] = ..., timeout_s: _Optional[float] = ..., attend: _Optional[_Union[AttendRequest, _Mapping]] = ...) -> None: ...

class DecodeReply(_message.Message):
    __slots__ = ("id", "attend", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    ATTEND_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    attend: AttendReply
    error: Error
    def __init__(self, id: _Optional[int] = ..., attend: _Optional[_Union[AttendReply, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class TruncateRequest(_message.Message):
    __slots__ = ("session_id", "length")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    length: int
    def __init__(self, session_id: _Optional[str] = ..., length: _Optional[int] = ...) -> None: ...

class TruncateReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForkRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class ForkReply(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class LengthsRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class LengthsReply(_message.Message):
    __slots__ = ("lengths",)
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...
