"""What is timed: operations, sizes, presets and suites, and a case made real."""
