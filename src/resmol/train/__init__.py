"""The training loop and what surrounds it. Start reading at `loop`."""
