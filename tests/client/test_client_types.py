"""What a caller says is checked where it is said, and the client's defaults are the daemon's."""

import math
from dataclasses import asdict, fields
from typing import Any

import pytest
import tierd_kernels.policy
from tierd_client import Budget, Certificate, Coverage, Geometry, InvalidArgument, Tolerance, connect, errors
from tierd_client.target import default_target, resolve
from tierd_client.types import as_policy
from tierd_proto.coding import CERTIFICATE_COLUMNS

import tierd.config
import tierd.errors

GOOD: dict[str, Any] = {"num_layers": 1, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}


@pytest.mark.parametrize("runtime_dir", ["/run/user/7", "", None])
def test_both_sides_have_one_default_target(monkeypatch: pytest.MonkeyPatch, runtime_dir: str | None) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if runtime_dir is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime_dir)
    assert default_target() == tierd.config.default_target() == resolve(None, None)


def test_both_sides_have_the_same_policies_and_errors() -> None:
    for ours, theirs in ((Budget(), tierd_kernels.policy.Budget()), (Coverage(), tierd_kernels.policy.Coverage())):
        assert asdict(ours) == asdict(theirs)
    for kind in tierd.errors.TierdError.__subclasses__():
        assert errors.from_code(kind.code, "x", "t").code == kind.code


def test_a_certificate_has_a_field_for_every_column() -> None:
    assert [field.name for field in fields(Certificate)] == list(CERTIFICATE_COLUMNS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 0}, "num_layers is 0; allowed: 1 to"),
        ({"num_q_heads": 3}, "num_q_heads is 3; it must be a multiple of num_kv_heads, 2"),
        ({"head_dim": 64.0}, "head_dim is 64.0; it must be a whole number"),
        ({"block_size": True}, "block_size is True"),
        ({"value_group": 1 << 32}, "value_group is"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float16, bfloat16, float32"),
        ({"softmax_scale": math.inf}, "softmax_scale is inf"),
        ({"softmax_scale": "1"}, "softmax_scale is '1'"),
        ({"softmax_scale": 10**400}, "softmax_scale is 10000"),
        ({"dtype": ["float16"]}, r"dtype is \['float16'\]; allowed"),
    ],
)
def test_geometries_are_checked(change: dict[str, Any], said: str) -> None:
    assert Geometry(**GOOD).softmax_scale is None
    with pytest.raises(InvalidArgument, match=said):
        Geometry(**GOOD | change)


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf, 10**400, "0.1", None])
@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_are_checked(name: str, bad: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"{name} is {bad!r}; allowed: a finite number of at least 0"):
        Tolerance(**{"rtol": 0.0, name: bad})
    with pytest.raises(ValueError, match="relative_to is 'keys'; allowed: values, output"):
        Tolerance(0.0, relative_to="keys")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Budget, {"skip_share": 1.0}),
        (Budget, {"skip_share": -0.1}),
        (Budget, {"require_rank": 1}),
        (Coverage, {"tau_cov": 0.0}),
        (Coverage, {"tau_cov": 1.1}),
        (Coverage, {"k_min": 3, "k_max": 2}),
        (Coverage, {"k_max": -1}),
        (Coverage, {"key_bound_max": math.nan}),
        (Coverage, {"v_tol": -1.0}),
        (Coverage, {"boundary_check": 1}),
    ],
)
def test_policies_are_checked(kind: Any, change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=f"{next(iter(change))} is"):
        kind(**change)


def test_policies_by_name() -> None:
    assert (as_policy("budget"), as_policy("coverage")) == (Budget(), Coverage())


@pytest.mark.parametrize(
    "target", ["", "unix:relative", "unix:///", "http://127.0.0.1:1", "127.0.0.1", "127.0.0.1:0", ":7400", "h:70000", 7400, b"h:1"]
)
def test_other_targets_are_named(target: Any) -> None:
    with pytest.raises(InvalidArgument, match="allowed: unix:///path, host:port, inproc://"):
        connect(target)


def test_settings_are_for_the_engine_in_process() -> None:
    with pytest.raises(InvalidArgument, match="settings are for inproc://"):
        connect("127.0.0.1:7400", settings={})
    with pytest.raises(InvalidArgument, match="settings is a int; it must be a mapping"):
        connect("inproc://", settings=7)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="colour"):
        connect("inproc://", settings={"colour": "red"})
    with pytest.raises(InvalidArgument, match="timeout is -1"):
        connect("inproc://", timeout=-1)
