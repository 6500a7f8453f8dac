"""Running generated programs: separate processes without files, network or further processes, and structured outcomes.

The program and its tests run in two sandboxes joined by a pair of pipes. Over the pipes go calls and plain values;
the verdict goes from the tests to the host over a third pipe, which the program never holds.
"""
