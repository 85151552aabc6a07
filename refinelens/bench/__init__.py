"""The benchmark: the op beside what people use instead, checked against fp64 first, then timed in turn.

options -> sources -> problem -> peers -> competitors -> truth, memory and fresh processes, race and peak -> session
-> report -> table
"""
