"""What an evaluation measures: pure functions of numbers and texts, and the same for the library ``evaluate``.

A metric knows neither models nor files. One that has no value for its input says so and why; it never returns NaN.
"""
