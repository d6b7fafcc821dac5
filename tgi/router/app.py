"""The router process: the HTTP application around the table of routes, on a socket that the launcher holds."""

import asyncio
import dataclasses
import hmac
import logging
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tgi.core import child
from tgi.core.board import Board
from tgi.core.config import Settings
from tgi.core.errors import UNAUTHORIZED, RequestError, StartupError
from tgi.core.messages import Ready
from tgi.router import openapi, routes
from tgi.router.acceptor import Acceptor
from tgi.router.call import Call
from tgi.router.client import EngineClient
from tgi.router.connection import Connection, watch_readers
from tgi.router.formats import format_of
from tgi.router.grammar import Grammars
from tgi.router.journal import Journal
from tgi.router.metrics import Metrics
from tgi.router.pipeline import Permits, Service
from tgi.router.rendering import Templates
from tgi.router.tokenizer import Tokenizer
from tgi.router.tracing import Tracer
from tgi.router.validate import Validator
from tgi.router.wire.base import OneOf, Unreadable, check_keys, decode, decode_one

log = logging.getLogger(__name__)


class Endpoint:
    """All methods of one path, as an ASGI application: key, body, handler, and what becomes of an error."""

    def __init__(self, service: Service, rows: list[routes.Row]) -> None:
        self._service = service
        self._rows = {row.method: row for row in rows}
        if "GET" in self._rows:
            self._rows["HEAD"] = self._rows["GET"]
        self._allow = ",".join(sorted(self._rows))
        key = service.settings.api_key
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, receive, send)
        row = self._rows.get(scope["method"])
        if row is None:
            await call.answer(405, headers={"allow": self._allow})
        elif row.protected and not self._may(call, row):
            await row.errors.answer(call, RequestError(UNAUTHORIZED))
        else:
            service = dataclasses.replace(self._service, journal=Journal(row.name))
            try:
                await self._serve(call, row, service)
            finally:
                if service.tracer is not None and row.body is not None:
                    service.tracer.record(service.journal, call, row.method, row.path)

    def _may(self, call: Call, row: routes.Row) -> bool:
        if self._key is None:
            return True
        scheme, _, token = call.header(b"authorization").partition(b" ")
        given = [token] if scheme.lower() == b"bearer" else []
        if row.key_header is not None:
            given.append(call.header(row.key_header.encode()))
        return any(hmac.compare_digest(key, self._key) for key in given)

    async def _serve(self, call: Call, row: routes.Row, service: Service) -> None:
        try:
            if row.body is None:
                await row.handler(call, service, None)
            else:
                request = await self._request(call, row)
                await call.while_connected(row.handler(call, service, request))
        except Unreadable as error:
            await row.errors.answer(call, error)
        except ConnectionError:
            log.debug("a client left before its request was read")
        except Exception as error:
            judged = service.judge(error)
            if not call.answered:
                await row.errors.answer(call, judged)

    async def _request(self, call: Call, row: routes.Row) -> object:
        kind = call.header(b"content-type").partition(b";")[0].strip().lower()
        if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
            raise Unreadable(415, "Expected request with `Content-Type: application/json`")
        body = await call.body(self._service.settings.limits.payload_limit)
        request = decode_one(body, row.body) if isinstance(row.body, OneOf) else decode(body, row.body)
        check_keys(body)
        return request


def create(service: Service) -> Starlette:
    """The application; it talks to the engine for as long as it lives."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        engine = asyncio.create_task(service.client.run())
        engine.add_done_callback(_report_end)
        service.templates.start()
        yield
        engine.cancel()
        await asyncio.wait([engine])
        service.validator.close()
        service.templates.close()
        if service.tracer is not None:
            service.tracer.close()

    rows = (*routes.ROUTES, *routes.named_by_vertex(service.settings), *openapi.OWN_ROUTES)
    paths = dict.fromkeys(row.path for row in rows)  # in the table's order: the first are looked at first
    app = Starlette(
        routes=[Route(path, Endpoint(service, [row for row in rows if row.path == path])) for path in paths],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=service.settings.cors_allow_origin or ["*"],
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],  # clients send the key, versions and statistics, each under names of its own
            )
        ],
        exception_handlers={404: _not_found},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def build(settings: Settings, board: Board | None = None) -> Service:
    """The parts of a router. Raises StartupError for a model folder that it can't serve."""
    board = board or Board()
    folder, path = Path(settings.model.folder), settings.tokenizer_config_path
    tokenizer = Tokenizer.load(folder, None if path is None else Path(path))
    metrics = Metrics(settings.limits, board)
    grammars = Grammars(folder, path, tokenizer.eos_ids) if settings.grammars else None
    watermark = settings.watermark_gamma, settings.watermark_delta
    formats = {
        name: format_of(source, tokenizer.added, settings.tool_call_parser, settings.reasoning_parser).spelled_with(
            {text: id for text, id in tokenizer.added.items() if id in tokenizer.special_ids}
        )
        for name, source in {"default": "", **tokenizer.chat_templates}.items()
    }
    return Service(
        settings=settings,
        tokenizer=tokenizer,
        templates=Templates(
            tokenizer.chat_templates,
            tokenizer.special_tokens,
            largest=4 * settings.limits.payload_limit,
            count=settings.limits.validation_workers,
        ),
        formats=formats,
        validator=Validator(settings.limits, tokenizer, watermark, grammars),
        client=EngineClient(settings.socket, metrics, settings.longest_step, board),
        metrics=metrics,
        permits=Permits(settings.limits.max_concurrent_requests, board),
        tracer=None if settings.otlp_endpoint is None else Tracer(settings),
    )


def serve(settings: Settings, place: child.Place, report: child.Report) -> None:
    """Until SIGTERM or SIGINT; then open answers are finished, however long they take, and nothing new is accepted."""
    if place.listen is None:
        raise StartupError("the router needs --listen-fd, a listening TCP socket")
    # A connection is a descriptor, and shells allow 1024 where the system allows many more.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn, when done, raises again the signal that ended it: that is a clean end.
        signal.signal(number, lambda *_: sys.exit(0))
    listener = socket.socket(fileno=place.listen)
    watch_readers(listener)
    board = Board(place.worker, settings.router_workers, place.memory)
    service = build(settings, board)
    server = _Server(configure(create(service)), lambda: report(Ready()), service.client.drain, board)
    server.run([listener])


def configure(app: Starlette) -> uvicorn.Config:
    """How the application is served: the fast loop and parser, our own log, connections kept as proxies like them."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,  # the connection's: uvicorn's needs a timer
        timeout_keep_alive=75,
    )


class _Path(PathConvertor):
    """Starlette's, for names with line breaks, too: they get the route's own error."""

    regex = "(?s:.*)"


register_url_convertor("path", _Path())


class _Server(uvicorn.Server):
    """Tells when it accepts connections. Sleeps where uvicorn's own looks ten times a second for the end."""

    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[], None], on_end: Callable[[], None], board: Board
    ) -> None:
        super().__init__(config)
        self._board = board
        self._acceptors: list[Acceptor] = []
        self._on_ready = on_ready
        self._on_end = on_end
        self._told_to_end = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if self._board.shared:
            await super().startup([])
            self._acceptors = [
                Acceptor(listener, self._board, self._protocol, lambda: len(self.server_state.connections))
                for listener in sockets or []
            ]
        else:
            await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for acceptor in self._acceptors:
            await acceptor.close()
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        return Connection(self.config, self.server_state, self.lifespan.state)

    async def main_loop(self) -> None:
        await self._told_to_end.wait()
        self._on_end()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._told_to_end.set)


async def _not_found(_: Request, __: Exception) -> Response:
    return Response(status_code=404)


def _report_end(engine: asyncio.Task[None]) -> None:
    if not engine.cancelled() and (error := engine.exception()):
        log.critical("the engine's client failed; /health will say so", exc_info=error)


if __name__ == "__main__":
    sys.exit(child.run("text_generation_router", serve))
