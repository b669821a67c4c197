"""The programs that `bench` measures, each in a process of its own."""
