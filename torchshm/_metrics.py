"""``torchshm metrics``: figures in the text format of Prometheus."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchshm._figures import Sample, Watcher
from torchshm._store_commands import Name

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import CollectorRegistry

# Key of Store.info(), name, what it is.
_STORE_GAUGES = (
    ("names", "names", "Names in the store."),
    ("limit_bytes", "limit_bytes", "Most memory that the store takes."),
    ("live_bytes", "live_bytes", "Bytes of blocks in use."),
    ("warm_bytes", "warm_bytes", "Bytes of pages kept for the next blocks."),
    ("committed_bytes", "committed_bytes", "Bytes with memory behind them: live, warm and in between."),
    ("ticket_bytes", "ticket_bytes", "Bytes of blocks that unreceived messages keep."),
    ("spilled_bytes", "spilled_bytes", "Bytes of values that are on disk."),
    ("spilled_names", "spilled_names", "Names whose values are on disk."),
    ("blocks", "blocks", "Blocks in use."),
    ("leases", "processes", "Processes that have the store."),
    ("created", "created_timestamp_seconds", "When the store was made, in seconds since 1970."),
)
_STORE_COUNTERS = (
    ("saved", "saves", "Names saved."),
    ("removed", "removals", "Names removed."),
    ("expired", "expirations", "Names that went when their time was up."),
    ("loads", "loads", "Values loaded."),
    ("restores", "restores", "Values brought back from disk."),
    ("restored_bytes", "restored_bytes", "Bytes brought back from disk."),
    ("spills", "spills", "Values written to disk to make room."),
    ("spilled_total_bytes", "spill_written_bytes", "Bytes written to disk to make room."),
    ("evictions", "evictions", "Names dropped to make room."),
    ("spill_errors", "spill_errors", "Values that could not be written to disk."),
    ("room_waits", "room_waits", "Times that somebody waited for room."),
)
_POOL_GAUGES = (
    ("limit_bytes", "limit_bytes", "Most memory that the pool takes."),
    ("live_bytes", "live_bytes", "Bytes of blocks in use."),
    ("warm_bytes", "warm_bytes", "Bytes of pages kept for the next blocks."),
    ("committed_bytes", "committed_bytes", "Bytes with memory behind them."),
    ("ticket_bytes", "ticket_bytes", "Bytes of blocks that unreceived messages keep."),
    ("blocks", "blocks", "Blocks in use."),
    ("leases", "processes", "Members of the pool."),
)


def families(sample: Sample) -> Iterator[Metric]:
    """Give the metric families of a sample."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    up = GaugeMetricFamily("torchshm_store_up", "1 when a service serves the store.", labels=["store"])
    for store in sample.stores:
        up.add_metric([store.name], 1 if store.service_pid else 0)
    yield up
    there = [store for store in sample.stores if store.figures is not None]
    for key, name, text in _STORE_GAUGES:
        gauge = GaugeMetricFamily(f"torchshm_store_{name}", text, labels=["store"])
        for store in there:
            gauge.add_metric([store.name], float((store.figures or {}).get(key) or 0))
        yield gauge
    for key, name, text in _STORE_COUNTERS:
        counter = CounterMetricFamily(f"torchshm_store_{name}", text, labels=["store"])
        for store in there:
            counter.add_metric([store.name], store.number(key))
        yield counter
    for key, name, text in _POOL_GAUGES:
        gauge = GaugeMetricFamily(f"torchshm_pool_{name}", text, labels=["pool"])
        for pool in sample.pools:
            gauge.add_metric([f"{pool.pool_id:016x}"], pool.figures[key])
        yield gauge
    held = GaugeMetricFamily(
        "torchshm_process_held_bytes",
        "Bytes of blocks that a process holds.",
        labels=["pool", "pid", "process"],
    )
    everywhere: list[tuple[int, dict[str, Any]]] = [
        *((store.number("pool_id"), store.figures) for store in there if store.figures is not None),
        *((pool.pool_id, pool.figures) for pool in sample.pools),
    ]
    for pool_id, figures in everywhere:
        for pid, process in {row["pid"]: row for row in figures["processes"]}.items():
            held.add_metric([f"{pool_id:016x}", str(pid), process["name"]], process["held_bytes"])
    yield held
    names = GaugeMetricFamily(
        "torchshm_store_info", "The pool of a store; always 1.", labels=["store", "pool"]
    )
    for store in there:
        names.add_metric([store.name, f"{store.number('pool_id'):016x}"], 1)
    yield names


class _Collector:
    """Looks when it is asked; one asker at a time."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._lock = threading.Lock()

    def describe(self) -> list[Metric]:
        return []  # nothing is known before the first look

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            sample = self._watcher.sample()
        return families(sample)


def _registry(watcher: Watcher) -> CollectorRegistry:
    from prometheus_client.registry import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(_Collector(watcher))  # type: ignore[arg-type, unused-ignore]
    return registry


def metrics(
    argument: Name = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Serve them by HTTP, until Ctrl-C; 0: any free port."),
    ] = None,
    address: Annotated[str, typer.Option(metavar="HOST", help="With --port: where to listen.")] = "127.0.0.1",
) -> None:
    """Write the figures of stores and pools in the text format of Prometheus."""
    try:
        import prometheus_client
    except ImportError:
        typer.echo("torchshm metrics needs prometheus_client: pip install 'torchshm[cli]'", err=True)
        raise typer.Exit(1) from None
    with Watcher(argument) as watcher:
        registry = _registry(watcher)
        if port is None:
            typer.echo(prometheus_client.generate_latest(registry).decode(), nl=False)
            return
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: ended.set())
        try:
            server, thread = prometheus_client.start_http_server(port, address, registry)
        except OSError as error:
            typer.echo(f"torchshm: {address}:{port}: {error.strerror}", err=True)
            raise typer.Exit(1) from None
        typer.echo(f"Metrics at http://{address}:{server.server_port}/metrics, until Ctrl-C.")
        while not ended.wait(0.2):  # a signal's handler may set it just before a sleep
            pass
        server.shutdown()
        thread.join()
