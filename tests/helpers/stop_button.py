"""Presses the stop button of a notebook while a campaign runs in it; `tiny.yaml` is in the working directory."""

import threading
import time
from pathlib import Path
from typing import Any

from jupyter_client.manager import start_new_kernel

from ngpt.system.heartbeat import read_heartbeat


def main() -> None:
    """Raises AssertionError if a cell does not end as it should."""
    manager, client = start_new_kernel(kernel_name="python3")

    def press() -> None:
        while not any((beat := read_heartbeat(trial)) and beat.step > 2 for trial in Path().glob("*/tiny/trials/*")):
            time.sleep(0.02)
        manager.interrupt_kernel()

    def execute(code: str) -> dict[str, Any]:
        return client.execute_interactive(code, timeout=200, output_hook=lambda _: None)["content"]

    try:
        ready = execute("import signal, tune; before = signal.getsignal(signal.SIGINT)")
        assert ready["status"] == "ok", ready
        threading.Thread(target=press, daemon=True).start()
        stopped = execute("tune.run('tiny.yaml', {'steps': 1000000}, out='results', inline=True)")
        assert stopped.get("ename") == "CampaignInterrupted", stopped
        assert "call run() with the same arguments" in stopped["evalue"]
        again = execute("assert tune.run('tiny.yaml', {'steps': 2}, out='short', inline=True).exit_code == 0")
        assert again["status"] == "ok", again
        restored = execute("assert signal.getsignal(signal.SIGINT) is before")
        assert restored["status"] == "ok", restored
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
