"""Files, heartbeats, devices, memory and timing: what a run needs from the machine."""
