"""Worker processes of `resmol bench`, each measured as a process of its own."""
