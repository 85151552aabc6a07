"""The benchmark: the op beside what people use instead, checked against fp64 first, then timed in turn.

options -> problem x competitors -> fp64 check and memory, then timed in turn -> report -> table. The scripts of
benchmarks/ are made of the same parts.
"""
