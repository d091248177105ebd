"""The server and the engine that ``bench/front.py`` measures: ``python -m octavo.bench.front_server serve|engine ...``."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from octavo.api.server.app import build_app
from octavo.api.server.listen import bind
from octavo.api.server.options import ServerOptions, ServerSettings
from octavo.api.server.serve import run_server
from octavo.bench.front import MODEL
from octavo.config import EngineOptions
from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import FullKV
from octavo.engine.client.messages import ProgressCall
from octavo.engine.client.serve import run_engine
from octavo.engine.client.socket import SocketClient
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.host import build_frontend, open_files
from octavo.host.fronts import Fronts
from octavo.protocol.plan import StepPlan

VOCAB_SIZE = 151936
CONTEXT = 2048


class SlowRunner(NullRunner):
    """A null runner whose steps take a given time."""

    step_s = 0.0

    def forward(self, plan: StepPlan) -> None:
        """See ``Runner.forward``."""
        super().forward(plan)
        time.sleep(self.step_s)


def build(raw: bytes, progress: ProgressCall) -> EngineCore:
    """The engine's process: ``raw`` is JSON of streams and step_ms."""
    asked = json.loads(raw)
    streams = int(asked["streams"])
    layout = plan_layout({0: FullKV(16, 1)})
    pages = streams * layout.pages_for(CONTEXT) + 64
    runner = SlowRunner(layout, num_pages=pages, num_slots=streams, vocab_size=VOCAB_SIZE)
    runner.step_s = float(asked["step_ms"]) / 1e3
    settings = EngineSettings(
        model=MODEL,
        max_model_len=CONTEXT,
        max_num_seqs=streams,
        max_num_batched_tokens=max(8192, streams),
        vocab_size=VOCAB_SIZE,
    )
    return EngineCore(InlineExecutor(runner), settings)


def serve(streams: int, step_ms: float, count: int, chat_template: str | None = None) -> int:
    """The server's first process, of ``count``."""
    options = EngineOptions.of(model=MODEL, load_format="dummy", chat_template=chat_template)
    files = open_files(options)
    asked = json.dumps({"streams": streams, "step_ms": step_ms}).encode()
    server = ServerOptions(
        port=0, disable_uvicorn_access_log=True, uvicorn_log_level="warning", api_server_count=count
    )
    listener = bind(server, share=count > 1)
    fronts = Fronts(options, server)

    async def start() -> Any:
        if count > 1:
            await fronts.begin(count - 1, listener)
        client = SocketClient.launch([sys.executable, "-m", "octavo.bench.front_server", "engine"], asked)
        fronts.engines_ready(client)
        frontend = build_frontend(options, files, client)
        return build_app(frontend, client, ServerSettings.of(server, (MODEL,)), fronts.desk), client

    def ready(url: str) -> None:
        pids = " ".join(str(pid) for pid in [os.getpid(), *fronts.pids])
        print(f"Serving from {pids} at {url}", flush=True)

    return run_server(start, server, on_ready=ready, listener=listener, siblings=fronts)


def main(argv: list[str]) -> int:
    """``serve STREAMS STEP_MS PROCESSES [CHAT_TEMPLATE]`` or ``engine ADDRESS``."""
    if argv[0] == "engine":
        return run_engine(argv[-1], build)
    return serve(int(argv[1]), float(argv[2]), int(argv[3]), *argv[4:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
