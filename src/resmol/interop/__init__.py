"""Models in other formats: resolve, load, evaluate, inspect and export them. Training imports nothing from here."""
