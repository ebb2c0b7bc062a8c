"""How it is timed: providers, clocks, memory, the machine."""
