"""`make bench-gpu`: kernels and engine on a GPU, against the device's own ceilings and their peers.

`__main__` runs the cells of `cases` in a process of their own (`supervisor`, `worker`), one
after the other in order of importance, as long as the time lasts. `report` makes the lines,
the table and the tables of docs/performance.md out of what they say.
"""
