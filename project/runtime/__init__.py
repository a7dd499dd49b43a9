"""The process and its machine: console, signals, seeds, distributed runs, atomic writes, loggers."""
