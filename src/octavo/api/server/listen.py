"""The listening sockets: bound before anything is loaded, one for each front process, and what their flags must satisfy.

Imports nothing heavy, so that a port in use is reported at once.
"""

from __future__ import annotations

import errno
import socket
import ssl
import stat
from dataclasses import replace
from pathlib import Path

from octavo.api.server.options import ServerOptions
from octavo.errors import UsageError


def check(options: ServerOptions) -> None:
    """``UsageError`` for whatever would only fail after the model is loaded."""
    options.check()
    options.keys()
    options.key_entries()
    check_tls(options)


def bind(options: ServerOptions, share: bool = False) -> socket.socket:
    """The listening address, reserved; ``UsageError`` in one sentence where that is impossible.

    With ``share`` further sockets can be bound to the same port (``bind_beside``).
    """
    if options.uds is not None:
        return _bind_unix(options.uds)
    listener = _bind_port(options, share=False)
    if not share or not hasattr(socket, "SO_REUSEPORT"):
        return listener
    # A port that may be shared could be shared with a stranger: the first socket has made sure that there is none.
    port = listener.getsockname()[1]
    listener.close()
    return _bind_port(replace(options, port=port), share=True)


def bind_beside(listener: socket.socket, options: ServerOptions) -> socket.socket:
    """A socket for another process: a port's own (the kernel deals connections by their addresses), else the same one."""
    if options.uds is not None or not hasattr(socket, "SO_REUSEPORT"):
        return listener.dup()
    return _bind_port(replace(options, port=listener.getsockname()[1]), share=True)


def _bind_port(options: ServerOptions, share: bool) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise UsageError(f"--host {options.host} is not an address of this machine.") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        where = f"{options.host}:{options.port}"
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"The address {where} is in use by another program.", "Stop it, or choose another --port."
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UsageError(
                f"This user may not listen on {where}.", "Choose a --port from 1024 on."
            ) from None
        raise UsageError(
            f"{where} cannot be listened on: {error.strerror}.", "Choose another --host."
        ) from None
    return listener


def check_tls(options: ServerOptions) -> None:
    """``UsageError`` for certificate files that cannot be used; without this they would fail after the loading."""
    if options.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password is never asked for: a server that waits at a prompt looks like one that hangs.
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, password=lambda: b"")
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"--ssl-certfile {options.ssl_certfile} with --ssl-keyfile {options.ssl_keyfile} is not usable: {error}.",
            "Give a certificate and its unencrypted private key as PEM files.",
        ) from None
    if options.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(options.ssl_ca_certs)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"--ssl-ca-certs {options.ssl_ca_certs} is not usable: {error}.") from None


def url(options: ServerOptions, listener: socket.socket) -> str:
    """Where clients find the API."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{port}{options.root_path}/v1"


def _bind_unix(path: str) -> socket.socket:
    file = Path(path)
    if file.exists() and not stat.S_ISSOCK(file.stat().st_mode):
        raise UsageError(f"--uds {path} exists and is not a socket.", "Choose another path.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if file.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise UsageError(f"--uds {path} is in use by another program.", "Choose another path.")
            file.unlink()  # left behind by a process that was killed
        listener.bind(path)
    except UsageError:
        listener.close()
        raise
    except OSError as error:
        listener.close()
        raise UsageError(f"--uds {path} cannot be listened on: {error.strerror or error}.") from None
    return listener
