"""llama.cpp's HTTP server as a program, the way `llama-server` is one: the same C++ code, from the wheel that ships it as a library.

python llama_server.py MODEL.gguf --mmproj MMPROJ.gguf --port 8080 --alias NAME
"""

from __future__ import annotations

import argparse
import signal
import tempfile
from pathlib import Path

from gguf_model import write_gguf


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--alias", default="tiny")
    parser.add_argument("--api-key", default="")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        found = write_gguf(options.folder, Path(place))
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.mmproj.path = str(found.model), str(found.mmproj)
        params.model_alias = {options.alias}
        params.port, params.hostnames = options.port, ["127.0.0.1"]
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 4096, 8, 1, 1
        params.use_jinja, params.cache_ram_mib, params.warmup = True, 0, False
        if options.api_key:
            params.api_keys = [options.api_key]
        server = xllamacpp.Server(params)
        print(server.listening_address, flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
