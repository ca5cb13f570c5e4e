"""The paper's experiments at the scale of a small world, with the controls they lack.

units        what is trained or measured, one at a time, and what decides its figures
records      figures of units as JSON lines, kept and extended over days
jobs         units as processes
measure      what a process does that measures
statistics   means, intervals and verdicts over seeds
experiments  which units an experiment consists of, and what it claims
book         records as a report
"""
