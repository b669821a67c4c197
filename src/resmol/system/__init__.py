"""What the operating system and the network give: durable files, locks, signals, downloads. No PyTorch."""
