"""The crash-loop breaker: a run that was started again and again and never got further stays down, and says why.

`starts.json`, beside the checkpoints, counts the starts from the newest one, and holds how the last start ended. It is
of no use once there is a newer checkpoint, and is then begun again.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from shards.store import Store, StoreError

STARTS = "starts.json"
FORGIVEN = "interrupted, or refused for its config"  # such a start is not counted


class StaysDown(ValueError):
    """A run was started too often without getting further; the message says how it ended and what to do."""


def count_start(store: Store, step: int, allowed: int) -> None:
    """Note a start from the checkpoint of `step` (0: none yet).

    Raises:
        StaysDown: `allowed` starts (0: any number) reached no newer checkpoint.
    """
    before = _read(store)
    again = before.get("step") == step and before.get("ended") != FORGIVEN
    count = before["count"] + 1 if again else 1
    if allowed and count > allowed:
        ended = before.get("ended") or "was killed, or its machine was lost: it left no message"
        raise StaysDown(
            f"run: {store.url} was started {before['count']} times from step {step} and reached no new checkpoint. The "
            f"last start: {ended}. Mend the cause and remove {store.url}/{STARTS}, or allow more with guard.starts="
        )
    store.put(STARTS, json.dumps({"step": step, "count": count}).encode())


def note_end(store: Store, reason: str) -> None:
    """Note how this start ended; the first to say so is believed, since others fail because of it."""
    with suppress(StoreError):  # it ends because of another error, which is the one to be told
        now = _read(store)
        if now and ("ended" not in now or reason == FORGIVEN):
            store.put(STARTS, json.dumps({**now, "ended": reason}).encode())


def _read(store: Store) -> dict[str, Any]:
    """What is known; nothing where there is no such file, or half of one."""
    if not store.exists(STARTS):
        return {}
    try:
        found = json.loads(store.get(STARTS))
        return found if isinstance(found, dict) and {"step", "count"} <= found.keys() else {}
    except ValueError:
        return {}
