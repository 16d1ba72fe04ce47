"""The web server of the annotators' page.

It trusts no browser: a page of another origin can neither read nor answer (`_guard`), whatever name it makes point at
this machine, and the page itself may load and run only its own contents (a content security policy).
"""

import asyncio
import base64
import errno
import hashlib
import hmac
import html
import ipaddress
import re
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import urlencode, urlsplit

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rlhf.collect.annotation import Ranking, clean_name
from rlhf.collect.collection import Collection, StaleAnswerError, described
from rlhf.errors import RequestError, TryAgainError

MAX_REQUEST_BYTES = 1 << 16
EXPORT_EVERY = 20
"""Number of answers after which the result is written again; it is written at the end too."""
SHUTDOWN_SECONDS = 2.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Given(BaseModel):
    """An answer as the page sends it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    annotator: Annotated[str, AfterValidator(clean_name)]
    row: str
    ranking: Ranking | None
    """By positions on the page; null skips."""
    replaces: int = Field(ge=0)
    """The sequence of the answer that the page showed; 0 for none."""


class RefusedError(Exception):
    """The request is refused with a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(status, sentence)
        self.status, self.sentence = status, sentence


class Server:
    """Answers the page's requests.

    token  the token that a request must have; None if the page is served to this machine only
    """

    def __init__(self, collection: Collection, token: str | None) -> None:
        self._collection = collection
        self._token = token
        # A browser must not send answers that it still keeps to the page of other rows on the same port.
        self._project = hashlib.sha256(str(collection.out.resolve()).encode()).hexdigest()[:16]
        page = files("rlhf.collect").joinpath("page.html").read_text(encoding="utf-8")
        self._page = page.replace("{{project}}", self._project).replace("{{title}}", html.escape(collection.out.stem))
        hashes: list[str] = []
        for element in ("script", "style"):
            match = re.search(f"<{element}>(.*?)</{element}>", self._page, re.DOTALL)
            assert match is not None, f"the page has one {element} element"
            hashes.append(f"'sha256-{base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()}'")
        self._policy = (
            f"default-src 'none'; script-src {hashes[0]}; style-src {hashes[1]}; "
            "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def application(self) -> web.Application:
        """Return the routes, with the guard before them."""

        async def show_page(_: web.Request) -> web.Response:
            return web.Response(text=self._page, content_type="text/html")

        application = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[self._guard])
        application.router.add_get("/", show_page)
        application.router.add_get("/api/task", self._task)
        application.router.add_post("/api/answer", self._answer)
        return application

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse requests that are not the page's own; mark every response as this page's only."""
        try:
            self._check(request)
            response = await handler(request)
        except RefusedError as refusal:
            response = web.json_response({"error": refusal.sentence}, status=refusal.status)
        except web.HTTPException as error:
            response = web.json_response({"error": error.reason}, status=error.status)
        response.headers.update(
            {
                "Cache-Control": "no-store",
                "Content-Security-Policy": self._policy,
                "Cross-Origin-Opener-Policy": "same-origin",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
            }
        )
        return response

    def _check(self, request: web.Request) -> None:
        if self._token is None:
            try:
                # Without the port: a tunnel may have another port at its near end.
                name = urlsplit(f"//{request.host}").hostname or ""
            except ValueError:
                name = ""
            # Another site's name that points here (DNS rebinding) is still that site's origin.
            if not is_loopback(name):
                raise RefusedError(403, "this page is served under the name localhost only")
        else:
            is_page = request.path == "/"
            given = request.query.get("token", "") if is_page else request.headers.get("Authorization", "")
            expected = self._token if is_page else f"Bearer {self._token}"
            if not hmac.compare_digest(given.encode(errors="replace"), expected.encode()):
                raise RefusedError(403, "open the whole address that rlhf annotate printed when it was started last")
        if request.path.startswith("/api/") and request.headers.get("X-Project") != self._project:
            raise RefusedError(412, "another file is annotated here now: open the page again")
        if request.method == "POST":
            if urlsplit(request.headers.get("Origin", "")).netloc != request.host:
                raise RefusedError(403, "an answer comes from this page or not at all")
            if request.content_type != "application/json":
                raise RefusedError(415, "an answer is JSON")

    async def _task(self, request: web.Request) -> web.Response:
        annotation = self._collection.annotation
        try:
            annotator = clean_name(request.query.get("annotator", ""))
        except ValueError as problem:
            raise RefusedError(400, str(problem)) from None
        row = request.query.get("row") or annotation.first_left(annotator)
        if row is not None and row not in annotation.sets:
            raise RefusedError(404, "there is no such row any more")
        document: dict[str, Any] = {"annotator": annotator, "progress": annotation.progress(annotator)._asdict()}
        if row is None:
            previous, next_skipped = annotation.previous(annotator), annotation.next_skipped(annotator)
            document |= {"row": None, "previous": previous, "next_skipped": next_skipped}
        else:
            task = annotation.task(annotator, row)
            prompt = task.prompt if isinstance(task.prompt, str) else [message.model_dump() for message in task.prompt]
            document |= asdict(task) | {"prompt": prompt}
        return web.json_response(document)

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            given = Given.model_validate_json(await request.read())
        except ValidationError as error:
            raise RefusedError(400, described(error, ": ")) from None
        annotation = self._collection.annotation
        if given.row not in annotation.sets:
            raise RefusedError(404, "there is no such row any more")
        if problem := annotation.problem(given.row, given.ranking):
            raise RefusedError(400, problem)
        try:
            # Not on another thread: answers are acknowledged in the order of the journal's lines.
            answer = self._collection.answer(given.annotator, given.row, given.ranking, given.replaces)
        except StaleAnswerError:
            raise RefusedError(409, "this was answered in another window meanwhile") from None
        except TryAgainError as error:
            print(error, file=sys.stderr)
            raise RefusedError(503, error.what) from None
        if answer.sequence % EXPORT_EVERY == 0:
            try:
                self._collection.export()
            except TryAgainError as error:
                # The answers are safe in the journal, and the result is written again later.
                print(error, file=sys.stderr)
        return web.json_response({"sequence": answer.sequence})


def serve(
    collection: Collection, host: str, port: int, annotator: str | None, tell: Callable[[str, bool], None]
) -> None:
    """Serve the page until SIGINT or SIGTERM.

    tell  is called, once the page is served, with its address, and whether it is for other machines too

    Raises RequestError if the page cannot be served at the address.
    """
    token = None if is_loopback(host) else secrets.token_urlsafe(24)

    async def run() -> None:
        ended = asyncio.Event()
        for signal_ in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signal_, ended.set)
        application = Server(collection, token).application()
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    with socket.create_server((host, 0), family=family) as free:
                        next_step = f"--port {free.getsockname()[1]}"
                    raise RequestError(f"port {port} is taken", f"--port, on {host}", next_step) from error
                raise RequestError(
                    f"the page cannot be served at {host}, port {port}: {error.strerror or error}",
                    "--host and --port",
                    "name an address of this machine and a port from 1024 on",
                ) from error
            shown = f"[{host}]" if ":" in host else host
            if host in ("0.0.0.0", "::"):  # noqa: S104 - what the user asked for, compared and not bound
                shown = socket.gethostname()
            words = {name: value for name, value in (("annotator", annotator), ("token", token)) if value is not None}
            address = f"http://{shown}:{runner.addresses[0][1]}/"
            tell(f"{address}?{urlencode(words)}" if words else address, token is not None)
            await ended.wait()
        finally:
            await runner.cleanup()

    asyncio.run(run())


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address; False for every name other than localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
