"""Input files → chunks of rows for worker processes. The kind of a file is told by its content before its name.

`files` finds what a path stands for; `kinds` tells what a file is; `streams` reads bytes, compressed or not; `text`, `cells`
and `tables` are the kinds; `chunks` is what they give.
"""
