"""Names of things that outlive a call. Random, so that a name from before a restart is never valid after it."""

import secrets


def new_session_id() -> str:
    """A session name that was never used before, such as `s-9f1c2a7e44d03b58`."""
    return f"s-{secrets.token_hex(8)}"


def new_epoch() -> str:
    """The name of one life of the daemon: workers see by it that it restarted."""
    return secrets.token_hex(8)
