"""Reading: how a stream reads; nothing in it changes which samples come when."""

from __future__ import annotations

from pydantic import ByteSize, ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Reading:
    """Threads, memory and cache of one reader (one rank, or one worker of a DataLoader)."""

    threads: int = Field(default=2, ge=1, description="threads that check and decode, and as many that normalise")
    requests: int = Field(default=8, ge=1, description="reads under way at once")
    ahead: int = Field(default=64, ge=1, description="decoded samples kept ready, as far as memory allows")
    memory: ByteSize = Field(
        default=ByteSize(1 << 30), ge=1 << 20, description="bytes of tars held at once, and as many decoded"
    )
    cache_dir: str = Field(default="", description="node-local folder that keeps tars of s3://; empty = no cache")
    cache_limit: ByteSize = Field(default=ByteSize(200 * 10**9), ge=1, description="bytes of that folder at most")
