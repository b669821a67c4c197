"""The network. Start reading at `llama`."""
